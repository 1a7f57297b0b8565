#!/bin/bash
# Start a Slurm of two nodes, n1 and n2, on this machine, on ports that are free:
#     tests/slurm/start.sh FOLDER && export SLURM_CONF=FOLDER/slurm.conf    # ... and: tests/slurm/stop.sh FOLDER
# Needs root, and Debian's packages slurm-wlm and munge. Jobs need MASTER_ADDR=127.0.0.1, as nobody resolves n1.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"/{run,log,state,spool/n1,spool/n2}
ROOT=$(cd "$1" && pwd)
export SLURM_CONF=$ROOT/slurm.conf
chmod 755 "$ROOT" "$ROOT/run"

PORTS=$(python3 -c '
import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(one.getsockname()[1] for one in held))')
read -r PORT PORT1 PORT2 <<<"$PORTS"
sed -e "s|@ROOT@|$ROOT|g; s|@HOST@|$(hostname -s)|g; s|@PORT@|$PORT|; s|@PORT1@|$PORT1|; s|@PORT2@|$PORT2|" \
    "$HERE/slurm.conf" >"$SLURM_CONF"

(umask 077 && head -c 1024 /dev/urandom >"$ROOT/munge.key")
# --force: folders that others may write to, such as /tmp, may lie above.
munged --force --key-file="$ROOT/munge.key" --seed-file="$ROOT/state/munge.seed" --log-file="$ROOT/log/munged.log" \
    --socket="$ROOT/run/munge.socket" --pid-file="$ROOT/run/munged.pid"
slurmctld
slurmd -N n1
slurmd -N n2
for _ in $(seq 150); do
    [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = 2 ] && exit 0
    sleep 0.1
done
echo "Slurm did not start:" >&2
tail -n 5 "$ROOT"/log/*.log >&2
"$HERE/stop.sh" "$ROOT"
exit 1
