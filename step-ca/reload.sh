#!/bin/bash
# Makes the step-ca of this container take a changed ca.json, and says whether it
# did. Run by "make init" inside the container; step-ca is process 1.
set -euo pipefail
cd "$STEPPATH"

# This directory is a tmpfs that is mounted at the container's start and touched
# at each accepted reload, so its time is when step-ca last read ca.json.
if [[ ! config/ca.json -nt . ]]; then
	echo "step-ca: unchanged"
	exit
fi

# A refused reload is a line in the log and nothing else. An accepted one shows in
# step-ca's own certificate, which is made anew (smallstep/certificates, ca/ca.go).
own_certificate() { step certificate fingerprint https://localhost:9000 --roots certs/root_ca.crt; }

before=$(own_certificate)
taken=$(date +%s.%N)
kill -HUP 1
for _ in {1..50}; do
	sleep 0.2
	if now=$(own_certificate) && [[ $now != "$before" ]]; then
		touch -d "@$taken" .
		echo "step-ca: reloaded"
		exit
	fi
done
echo "step-ca: error: it refuses the new ca.json and keeps running with the old one" >&2
echo "step-ca: hint: its reason is in: docker compose logs --tail 20 step-ca" >&2
exit 1
