#!/bin/bash
# The stock image makes a CA here when there is none. This one never does: in
# this project provisioner-init is the only one that makes keys and ca.json.
set -euo pipefail

config=$STEPPATH/config/ca.json
if [[ " $* " == *" $config "* && ! -e $config ]]; then
  printf 'step-ca: error: no configuration at "%s"\n' "$config" >&2
  printf 'step-ca: hint: this image cannot initialise a CA, run provisioner-init first\n' >&2
  exit 2
fi
exec "$@"
