#!/bin/bash
# One job array. Each task executes one run of a study. `python -m experiments submit` replaces the placeholders in
# double braces (Jinja2). Copy this file, edit the two blocks marked "edit", and pass the copy with --template.

# ---- edit: options of your cluster (an option with two # is off) ----
##SBATCH --partition=gpu
##SBATCH --account=project
# One task for each GPU. The preset gives the number of tasks. Runs without training have one task.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node={{ processes }}
#SBATCH --gpus-per-node={{ processes }}
#SBATCH --cpus-per-task=10
#SBATCH --mem={{ 60 * processes }}G
#SBATCH --time={{ "24:00:00" if trains else "02:00:00" }}
# The number after % is the maximum number of runs of this array at the same time. Other arrays run in parallel, within
# the limits of your account.
#SBATCH --array={{ array }}%16

# ---- filled in by submit ----
#SBATCH --job-name={{ job }}
#SBATCH --chdir={{ directory | quote }}
#SBATCH --output={{ output | quote }}
#SBATCH --open-mode=append
# Five minutes before the time limit, the run receives a signal, saves a checkpoint, and is requeued.
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --kill-on-invalid-dep=yes
{% if timed %}
# The run measures time, so no other job may run on the node. Name one type of GPU to compare runs.
#SBATCH --exclusive
##SBATCH --constraint=kind
{% endif %}

# ---- edit: environment (not needed if the nodes have the same Python as the machine that calls submit) ----
# module load cuda
# source /path/to/venv/bin/activate
{% for name, value in variables.items() %}
export {{ name }}={{ value | quote }}
{% endfor %}

# ---- the run ----
set -u
RUNS=(
{% for run in runs %}
    {{ run | quote }}
{% endfor %}
)
RUN=${RUNS[$SLURM_ARRAY_TASK_ID]}
TASK=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
RESULTS={{ results | quote }}
STARTED=$RESULTS/slurm/logs/$RUN.started

exec >>"$RESULTS/slurm/logs/$RUN.log" 2>&1
echo "$(date '+%F %T') job $TASK starts, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST"
touch "$STARTED"
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not inherit it

srun --kill-on-bad-exit=1 {{ command }} "$RUN"
CODE=$?

# If a signal killed the run (memory, a lost node, a crash), requeue it. Do this only if this attempt has saved a
# checkpoint, so that a run that always crashes is not repeated forever.
if [ "$CODE" -gt 128 ] && [ "$RESULTS/checkpoints/$RUN.ckpt" -nt "$STARTED" ]; then
    echo "$(date '+%F %T') job $TASK was killed (exit code $CODE) after it had saved a checkpoint: requeued"
    scontrol requeue "$TASK" && exit 0
fi
echo "$(date '+%F %T') job $TASK ends with exit code $CODE"
exit "$CODE"
