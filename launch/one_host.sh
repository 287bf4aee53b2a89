#!/usr/bin/env bash
# One machine, all its devices: the same command, started again after a crash.
#
#   launch/one_host.sh --config=configs/deit_s.py --workdir=runs/deit_s
#
# Every device takes part by itself (one mesh over all of them); the batch size in the config is
# global. A run resumes from its workdir, so starting it again is all a restart takes. A mistake in
# the command (2) or a training that diverged (70) would only repeat itself, so those end it.
set -uo pipefail
readonly RESTARTS=${RESTARTS:-3}

# A compiled step is kept for the next start.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/iared2_jax/jax}
mkdir -p -m 700 "$JAX_COMPILATION_CACHE_DIR"

for ((start = 0; start <= RESTARTS; start++)); do
  python -m iared2_jax.main "$@"
  code=$?
  case $code in 0 | 2 | 70 | 130 | 143) exit $code ;; esac
  echo "launch: ended with exit code $code, start $((start + 1)) of $((RESTARTS + 1))" >&2
done
exit "$code"
