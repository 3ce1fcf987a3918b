# Sourced by the recipes beside it: checks the nodes and starts megatron_slm.pretrain on them.
#
#   launch ARGUMENTS...      everything that follows torchrun ... -m megatron_slm.pretrain, or what
#                            else program[] says
#
# One node                   bash examples/RECIPE.sh
# Several, without Slurm     on each:  NODES=4 NODE_RANK=0..3 MASTER_ADDR=node0 bash examples/RECIPE.sh
# Slurm                      sbatch --nodes 4 --ntasks-per-node 1 --gpus-per-node 8 --exclusive \
#                                --signal B:USR1@600 --requeue --open-mode append \
#                                --wrap "REQUEUE=1 exec bash examples/RECIPE.sh"
#                            (Slurm runs a copy of what it is given itself, away from this file)
# Only see the command       DRY_RUN=1 bash examples/RECIPE.sh
#
# Variables, which the environment overrides:
#
#   NODES          nodes of the job; Slurm's own under Slurm, else the recipe's
#   GPUS_PER_NODE  8
#   RANKS_PER_NODE as many; more with GPUS_PER_NODE=0, on nodes without GPUs
#   NODE_RANK      0, without Slurm: which node this is
#   MASTER_ADDR    localhost; under Slurm the job's first node.  Any name or address by which others
#                  reach the node of rank 0, which listens there
#   MASTER_PORT    29500, of the rendezvous, on MASTER_ADDR
#   NODE_ADDR      this node's address, where the one of its name is on a network that others cannot
#                  reach; expanded on each node, so '$(hostname -s)-ib' does under Slurm
#   MAX_RESTARTS   3: a rank that fails restarts all ranks, from the last checkpoint, that often
#   REQUEUE        0; 1 has Slurm queue the job again when USR1 has ended it: by scontrol, in the
#                  batch script, not in a container.  The B: of --signal sends USR1 there
#   CHECK          1: check nodes before the start; 0 leaves it out
#   PYTHON_ENV     shell command that sets up Python on a node; default: this repository's .venv,
#                  which tools/environment.sh makes (use_environment cuda, or container in
#                  NVIDIA's), unless the node's Python has megatron_slm
#   SRUN           options of srun, for example --container-image ... --container-mounts ...
#   EXTRA          more arguments, after the recipe's, which they override; SRUN and EXTRA are read
#                  as a shell reads words and quotes, and nothing in them is expanded or run
#   NCCL_*, TORCH_*, CUDA_*, GLOO_*, UCX_*   as they are; NCCL_SOCKET_IFNAME and NCCL_IB_HCA where
#                  a node has several networks
#   CUDA_DEVICE_MAX_CONNECTIONS 1, NCCL_DEBUG WARN, TORCH_NCCL_ASYNC_ERROR_HANDLING 1,
#   TORCH_NCCL_AVOID_RECORD_STREAMS 1, TORCH_DISABLE_SHARE_RDZV_TCP_STORE 1,
#   PYTORCH_CUDA_ALLOC_CONF expandable_segments:True
#   OMP_NUM_THREADS        4: threads of a rank on the CPU
#   PET_SIGNALS_TO_HANDLE  SIGINT,SIGHUP,SIGQUIT: those by which torchrun ends its ranks; the others
#                          are this script's
#
# SIGTERM, to this script or to all of its processes, and USR1, which Slurm sends 600 s before the end
# by --signal, let the step end, save a checkpoint and end the job with success; the same command then
# goes on from there.  Until it is saved nothing here kills a rank, so whoever preempts has to wait:
# Slurm's partitions by GraceTime (scancel by KillWait), Kubernetes by terminationGracePeriodSeconds.
# sbatch --requeue has Slurm start a job again that lost a node or was killed by preemption.

NODES="${SLURM_JOB_NUM_NODES:-${NODES:-1}}"
: "${GPUS_PER_NODE:=8}" "${NODE_RANK:=0}" "${MASTER_PORT:=29500}" "${MAX_RESTARTS:=3}" "${CHECK:=1}"
: "${DRY_RUN:=0}" "${EXTRA:=}" "${SRUN:=}" "${NODE_ADDR:=}" "${REQUEUE:=0}"

export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # Megatron's overlap needs it
# Else ranks that were restarted find in the store where those before them listened (torch 2.15).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
export TORCH_NCCL_AVOID_RECORD_STREAMS="${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}"
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
# torchrun would end its ranks within 30 s of a SIGTERM.  As torchrun's --signals-to-handle, which
# torch before 2.9 has not.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGINT,SIGHUP,SIGQUIT}"

program=(-m megatron_slm.pretrain)
may_be_killed=0 # 1 for a program that has everything saved at all times
slm_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

_refuse() {
    echo "error: $(hostname): $*" >&2
    exit 2
}

# words[]: those of a value, with its quotes heeded and nothing expanded.
_read_words() {
    local found
    found="$(xargs -r printf '%s\n' <<< "${!1}")" || _refuse "a quote is not closed in $1: ${!1}"
    words=()
    [ -z "$found" ] || mapfile -t words <<< "$found"
}

# Not by the directory it is called from.
_has_megatron_slm() {
    (cd / && python -c 'import megatron_slm') 2>/dev/null
}

# By one of NCCL's lists: of beginnings, with = of names, with ^ of what to leave out.
_check_names() {
    local value="${!1:-}" rest='*' name
    [[ -n "$value" && "$value" != ^* ]] || return 0
    [[ "$value" != =* ]] || rest=""
    for name in $(tr , ' ' <<< "${value#=}"); do
        ! compgen -G "$2/${name%%:*}$rest" >/dev/null || return 0
    done
    wrong+=("$1 names no $3: $value")
}

# Megatron's distributed optimizer resumes with the Adam of Transformer Engine or Apex alone.  A
# single rank has nothing to distribute.
_check_optimizer() {
    local word kept=()
    [[ " ${torchrun[*]} " == *" --use-distributed-optimizer "* ]] || return 0
    ! python -c 'try: from transformer_engine.pytorch.optimizers import FusedAdam
except ImportError: from apex.optimizers import FusedAdam' 2>/dev/null || return 0
    if [ $((NODES * ranks_per_node)) -gt 1 ]; then
        wrong+=("--use-distributed-optimizer needs Transformer Engine or Apex, and Python has \
neither: see use_environment cuda and container in tools/environment.sh")
        return
    fi
    for word in "${torchrun[@]}"; do
        case "$word" in
        --use-distributed-optimizer | --dist-ckpt-optim-fully-reshardable | --overlap-param-gather) ;;
        *) kept+=("$word") ;;
        esac
    done
    torchrun=("${kept[@]}")
    echo "note: without Transformer Engine or Apex there is no distributed optimizer, which one GPU \
does not need; layers are of plain torch, to try things out" >&2
}

# What goes wrong most often, before minutes are spent on it, and all of it at once.
_check_node() {
    local found name path wrong=()
    [ "$GPUS_PER_NODE" = 0 ] || {
        found="$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)"
        [ "$found" -ge "$GPUS_PER_NODE" ] ||
            wrong+=("$found GPUs, and GPUS_PER_NODE is $GPUS_PER_NODE")
        found="$( (nvidia-smi --query-gpu=ecc.errors.uncorrected.volatile.total \
            --format=csv,noheader,nounits 2>/dev/null || true) | grep -cE '^[1-9]' || true)"
        [ "$found" = 0 ] || wrong+=("$found GPUs have uncorrected memory errors; drain this node")
        _check_optimizer
    }
    for name in "$MASTER_ADDR" $NODE_ADDR; do
        [ -n "$(getent ahosts "$name" || true)" ] || wrong+=("$name has no address here")
    done
    if [ "$NODE_RANK" = 0 ] && (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; then
        wrong+=("port $MASTER_PORT is taken; set MASTER_PORT")
    fi
    _check_names NCCL_SOCKET_IFNAME /sys/class/net interface
    _check_names NCCL_IB_HCA /sys/class/infiniband adapter
    for path in ${INPUTS:-}; do
        [ -e "$path" ] || wrong+=("$path is not there (or not mounted on this node)")
    done
    [ -z "${SAVE:-}" ] || { mkdir -p "$SAVE" && [ -w "$SAVE" ]; } || wrong+=("cannot write to $SAVE")
    _has_megatron_slm || wrong+=("Python has no megatron_slm; see PYTHON_ENV")
    if [ ${#wrong[@]} -gt 0 ]; then _refuse "$(printf '; %s' "${wrong[@]}" | cut -c3-)"; fi
}

_command() {
    # The host is told, since a node may not know the name that others call it by.
    torchrun=(torchrun --nnodes="$NODES" --nproc-per-node="$ranks_per_node" --rdzv-backend=c10d
        --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="${SLURM_JOB_ID:-slm}"
        --rdzv-conf="is_host=$((NODE_RANK == 0))" --max-restarts="$MAX_RESTARTS")
    eval "NODE_ADDR=\"$NODE_ADDR\""
    [ -z "$NODE_ADDR" ] || torchrun+=(--local-addr="$NODE_ADDR")
    _read_words EXTRA
    torchrun+=("${program[@]}" "$@" "${words[@]}")
}

# One SIGTERM to each rank, as soon as it catches it: one that still starts ignores it.
_stop_ranks() {
    local rank caught told=" "
    trap '' TERM USR1
    while kill -0 "$1" 2>/dev/null; do
        for rank in $(cat "/proc/$1/task"/*/children 2>/dev/null || true); do
            caught="$(sed -n 's/^SigCgt:[[:space:]]*/0x/p' "/proc/$rank/status" 2>/dev/null || true)"
            if [[ "$told" != *" $rank "* ]] && ((${caught:-0} >> 14 & 1)); then
                kill -TERM "$rank" 2>/dev/null || true
                told+="$rank "
            fi
        done
        sleep 1
    done
}

_notice() {
    [ -z "$noticed" ] || return 0
    noticed="$1"
    echo "> $1: saving and ending"
    if [ "$may_be_killed" = 1 ]; then kill -HUP "$started" || true; else _stop_ranks "$started" & fi
}

# Of what was started, which signals do not end at once: they do end a wait, with a status of its own.
_wait_for() {
    while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
    status=0
    wait "$1" || status=$?
}

# Runs on every node.  Signals go past torchrun, which ignores them, to the ranks.
_run_node() {
    # shellcheck disable=SC1091
    if [ -n "${PYTHON_ENV:-}" ]; then
        set +u # activation scripts often read variables that are not set
        eval "$PYTHON_ENV" || _refuse "PYTHON_ENV fails: $PYTHON_ENV"
        set -u
    elif [ -f "$slm_root/.venv/bin/activate" ] && ! _has_megatron_slm; then
        source "$slm_root/.venv/bin/activate"
    fi
    if [ "$CHECK" = 1 ]; then _check_node; fi
    (trap '' TERM USR1 && exec "${torchrun[@]}") &
    started=$!
    trap '_notice TERM' TERM
    trap '_notice USR1' USR1
    _wait_for "$started"
    if [[ "$may_be_killed" = 1 && -n "$noticed" ]]; then status=0; fi
}

# The batch script starts itself again on every node, as one step, which srun passes signals on to.
_run_step() {
    export MASTER_ADDR
    _read_words SRUN
    # Since Slurm 22.05 srun does not take it from the job, and binds all ranks of a node to one core.
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
        export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"
    fi
    SLM_STEP_OF="$SLURM_JOB_ID" srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 \
        --kill-on-bad-exit=1 "${words[@]}" bash "$slm_recipe" &
    started=$!
    trap 'noticed=TERM; kill -TERM "$started" || true' TERM
    trap 'noticed=USR1; kill -USR1 "$started" || true' USR1
    _wait_for "$started"
}

_under_slurm() {
    [ -n "${SLURM_JOB_ID:-}" ]
}

# Else this is the batch script or the shell of salloc, which to some versions of Slurm is a step.
_in_our_step() {
    [ "${SLM_STEP_OF:-}" = "$SLURM_JOB_ID" ]
}

launch() {
    local torchrun words started status noticed="" ranks_per_node="${RANKS_PER_NODE:-$GPUS_PER_NODE}"
    if _under_slurm; then
        MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)}"
        NODE_RANK="${SLURM_NODEID:-$NODE_RANK}"
    fi
    : "${MASTER_ADDR:=localhost}"
    if [ "$DRY_RUN" = 1 ]; then
        _command "$@"
        printf '%q ' "${torchrun[@]}"
        echo
        return
    fi
    if ! _under_slurm || _in_our_step || [[ -n "${SLURM_STEP_ID:-}" && "$NODES" = 1 ]]; then
        _command "$@"
        _run_node
    else
        _run_step
    fi
    if [[ "$REQUEUE" = 1 && "$noticed" = USR1 && "$status" = 0 ]] && _under_slurm &&
        ! _in_our_step; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}
