#!/usr/bin/env bash
# Fetches a recipe's model and data into the cache, on a node with network; the others need none then.
#
#     launch/prepare.sh RECIPE [--field value …]
#
# Afterwards everything runs with HF_HUB_OFFLINE=1.
#
# Variables:
#   HF_HOME    the Hugging Face cache, on a disk that all nodes see (default: ~/.cache/huggingface)
#   HF_TOKEN   a token of an account that has accepted the model's licence
#   PYTHON, VENV, TORCH_INDEX, GROW_CACHE: see launch/demo.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

help_if_asked "$@"
site_settings
enter "$@"
install "$ROOT/requirements.txt"
grow fetch "$@"
