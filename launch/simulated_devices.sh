#!/usr/bin/env bash
# A dry run of a many-device job on one CPU: the first argument says how many devices to simulate.
#
#   launch/simulated_devices.sh 8 --config=configs/deit_s.py:runlocal --config.interpreter.batch_size=8 ...
set -euo pipefail
count=${1:?usage: launch/simulated_devices.sh <devices> --config=... [flags]}
shift
source "$(dirname "$0")/python.sh"
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${count}"
exec "$PYTHON" -m iared2_jax.main "$@"
