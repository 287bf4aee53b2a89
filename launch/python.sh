# Sourced by the scripts beside it: which Python runs, and from where.
#
# $PYTHON if it is set, else the environment that `make` makes in this checkout, else python3.
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=$repository/.venv/bin/python
  [ -x "$PYTHON" ] || PYTHON=python3
fi
