#!/bin/sh
# What an image installs, with hashes, out of uv.lock:   cluster/requirements.sh cpu | torch-cpu | cuda | serve
# cpu leaves out torch and what only its CUDA build needs: PyPI has that build alone, and the other is torch-cpu.
set -eu

locked() { uv export --quiet --frozen --no-dev --no-emit-project --no-header --no-annotate --format requirements-txt "$@"; }

case "${1:-}" in
  cuda) locked ;;
  serve) locked --extra vllm ;;
  # A requirement's hashes follow on lines of their own, which begin with a space.
  cpu) locked | awk '/^[^ ]/ {kept = !/^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==/} kept' ;;
  torch-cpu)
    # The wheel for Python 3.11 on x86_64 that the tests run with.
    version=$(locked | sed -n 's/^torch==\([^ ]*\).*/\1/p')
    echo "torch==$version+cpu --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"
    ;;
  *) echo "cluster/requirements.sh cpu | torch-cpu | cuda | serve" >&2 && exit 2 ;;
esac
