#!/usr/bin/env bash
# Makes ready what a recipe needs and a compute node may not reach: the virtual environment, the base model and the data,
# in the Hugging Face cache. Run it where there is a network: on the login node.
#
#     launch/prepare.sh RECIPE [--field value …]
#
# Variables:
#   HF_HOME    the cache, on a file system that the nodes share (default: ~/.cache/huggingface)
#   HF_TOKEN   a token, for models whose licence has to be accepted, as Gemma's has (default: that of `hf auth login`)
#   PYTHON, VENV, TORCH_INDEX, GROW_CACHE: see launch/demo.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ $# == 0 || " $* " == *" --help "* ]]; then
    help_of "$0"
    exit 0
fi
site_settings
install "$ROOT/requirements.txt"
"$VENV/bin/python" -m grow.fetch "$@"
