#!/usr/bin/env bash
# One machine, all its devices: the same command, started again after a crash.
#
#   launch/one_host.sh --config=configs/deit_s.py --workdir=runs/deit_s
#
# Every device takes part by itself (one mesh over all of them); the batch size in the config is
# global. A run resumes from its workdir, so starting it again is all a restart takes. It is started
# again, RESTARTS times (3), only where that may help: after a crash or a kill, not after an end that
# would only repeat itself (launch/README.md has the table of exit codes). SIGTERM and SIGINT are
# handed on: the run saves its state and ends with 75.
set -uo pipefail
source "$(dirname "$0")/python.sh"
readonly RESTARTS=${RESTARTS:-3}

# A compiled step is kept for the next start.
cache=${XDG_CACHE_HOME:-${HOME:+$HOME/.cache}}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-${cache:+$cache/iared2_jax/jax}}
if [ -n "$JAX_COMPILATION_CACHE_DIR" ]; then
  mkdir -p -m 700 "$JAX_COMPILATION_CACHE_DIR"
else
  unset JAX_COMPILATION_CACHE_DIR
fi

child=''
asked=''
hand_on() {
  asked=yes
  [ -z "$child" ] || kill -s TERM "$child" 2>/dev/null
}
trap hand_on TERM INT

for ((start = 0; start <= RESTARTS; start++)); do
  "$PYTHON" -m iared2_jax.main "$@" &
  child=$!
  wait "$child"
  code=$?
  # A signal ends the waiting, not the run: wait on until it has saved its state.
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
  done
  child=''
  case $code in 0 | 2 | 65 | 70 | 74 | 75 | 130 | 143) exit "$code" ;; esac
  [ -z "$asked" ] || exit "$code"
  echo "launch: ended with exit code $code, start $((start + 1)) of $((RESTARTS + 1))" >&2
done
exit "$code"
