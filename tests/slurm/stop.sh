#!/bin/bash
# Stop the Slurm that start.sh started in this folder, and the jobs in it: tests/slurm/stop.sh FOLDER
ROOT=$(cd "$1" && pwd) || exit 1
export SLURM_CONF=$ROOT/slurm.conf
timeout 5 scancel -u "$(id -un)"
for _ in $(seq 80); do
    [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break
    sleep 0.1
done
for name in slurmd-n1 slurmd-n2 slurmctld munged; do
    [ -s "$ROOT/run/$name.pid" ] || continue
    pid=$(cat "$ROOT/run/$name.pid")
    kill "$pid" 2>/dev/null || continue
    for _ in $(seq 50); do
        grep -q '^State:[[:space:]]*[^Z]' "/proc/$pid/status" 2>/dev/null || continue 2
        sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null # a slurmd that tries to register again and again does not hear
done
exit 0
