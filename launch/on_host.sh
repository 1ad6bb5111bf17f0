#!/usr/bin/env bash
# A rank on a host of HOSTFILE: unpacks the command and its variables, which launch/train.sh has packed so that no shell
# on the way changes a character of them, and lets the command take its place.
#
#     launch/on_host.sh PACKED
set -euo pipefail

if [[ $# != 1 || $1 == --help ]]; then
    awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
    [[ ${1:-} == --help ]] && exit 0 || exit 2
fi
mapfile -d '' words < <(base64 --decode <<<"$1" | gzip --decompress)
exec env "${words[@]}"
