#!/usr/bin/env bash
# Writes every lock: `make lock`. Pins of today's locks stay where they still fit; `make lock UPGRADE=--upgrade` takes
# the newest. uv resolves for each Python without having it; what is left out, and why, is in the files beside this one.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$1 upgrade=${2:-}
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT

compile() {  # NAME PYTHON ARGUMENT...: $work/NAME has the pins
    local name=$1 python=$2
    shift 2
    # deepspeed has no wheel; one of anything else must be there, as a machine without Rust or CUDA cannot build it.
    "$uv" pip compile --quiet --no-python-downloads --no-annotate --no-header $upgrade \
        --python-version "$python" --python-platform x86_64-manylinux_2_31 \
        --only-binary :all: --no-binary deepspeed --output-file "$work/$name" ../pyproject.toml "$@"
}

write() {  # LOCK DESCRIPTION: the pins on stdin become the lock
    { echo "# $2. Written by \`make lock\`; install with --no-deps."; cat; } > "$1"
}

for python in 3.11.5 3.12.0 3.13.0; do
    minor=${python%.*}
    lock=requirements-cpu-$minor.lock
    [ -f "$lock" ] || cp requirements-cpu-3.11.lock "$lock"  # a new Python starts from the pins of the others
    cat "$lock" requirements-dev.lock > "$work/all-$minor"
    cp "$work/all-$minor" "$work/cpu-$minor"
    left_out=(--excludes lock/cpu-excludes.txt --overrides lock/cpu-overrides.txt)
    # With the tools of development, whose requirements must hold beside the others; then without.
    compile "all-$minor" "$python" --extra cpu --extra demo --extra dev "${left_out[@]}"
    compile "cpu-$minor" "$python" --extra cpu --extra demo --constraints "$work/all-$minor" "${left_out[@]}"
    write "$lock" "CPU, Linux x86-64, Python $minor" < "$work/cpu-$minor"
    comm -23 <(sort "$work/all-$minor") <(sort "$work/cpu-$minor") > "$work/dev-$minor"
    if ! cmp -s "$work/dev-3.11" "$work/dev-$minor"; then
        echo "the tools of development differ between Python 3.11 and $minor; give each its lock:" >&2
        diff "$work/dev-3.11" "$work/dev-$minor" >&2
        exit 1
    fi
done
write requirements-dev.lock "Tools of development, on top of a CPU lock" < "$work/dev-3.11"

cp requirements-cuda.lock "$work/cuda"
compile cuda 3.11.5 --extra gpu --extra demo --extra s3 --excludes lock/cuda-excludes.txt
write requirements-cuda.lock "CUDA 13, Linux x86-64, Python 3.11" < "$work/cuda"
