#!/usr/bin/env bash
# Rung 7 in one command, under ten minutes and without a network: bench/gpu_run.sh OUT (--help).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
fit='import importlib.util as u, sys; sys.exit(sys.version_info < (3, 11) or not u.find_spec("torch"))'
for python in ${PYTHON:+"$PYTHON"} python python3; do
    if "$python" -c "$fit" 2>/dev/null; then
        # bigops may not be built yet; this part of bench/ needs nothing but Python.
        PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -P -m bench.gpu_run "$@"
    fi
done
echo "gpu_run: no Python of 3.11 or newer that has torch: name one with PYTHON=" >&2
exit 2
