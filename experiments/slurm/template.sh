#!/bin/bash
# One job array: each task makes one run of a study. `python -m experiments submit` fills in what stands in double braces
# (Jinja2). Copy this file, edit the two blocks marked "edit", and pass the copy with --template.

# ---- edit: what your cluster needs (an option with two # is off) ----
##SBATCH --partition=gpu
##SBATCH --account=project
# One task a GPU; as many as the preset names, and one for runs that do not train.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node={{ processes }}
#SBATCH --gpus-per-node={{ processes }}
#SBATCH --cpus-per-task=10
#SBATCH --mem={{ 60 * processes }}G
#SBATCH --time={{ "24:00:00" if trains else "02:00:00" }}
# At most so many runs of this array at once. Other arrays run beside it, within the limits of your account.
#SBATCH --array={{ array }}%16

# ---- filled in by submit ----
#SBATCH --job-name={{ job }}
#SBATCH --chdir={{ directory | quote }}
#SBATCH --output={{ output | quote }}
#SBATCH --open-mode=append
# Five minutes before the time is up the run is told, saves a checkpoint and goes back into the queue.
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --kill-on-invalid-dep=yes
{% if timed %}
# It measures time, so that nothing else may run on the node. Name one kind of GPU, to compare runs with each other.
#SBATCH --exclusive
##SBATCH --constraint=kind
{% endif %}

# ---- edit: environment (not needed where the Python that called submit is there on the nodes) ----
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

# Killed by a signal (memory, a lost node, a crash): once more, but only if this attempt has saved a checkpoint, so that
# a run that dies each time does not go on for ever.
if [ "$CODE" -gt 128 ] && [ "$RESULTS/checkpoints/$RUN.ckpt" -nt "$STARTED" ]; then
    echo "$(date '+%F %T') job $TASK was killed (exit code $CODE) after it had saved a checkpoint: requeued"
    scontrol requeue "$TASK" && exit 0
fi
echo "$(date '+%F %T') job $TASK ends with exit code $CODE"
exit "$CODE"
