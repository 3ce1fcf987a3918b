# Sourced by the recipes beside it: checks the nodes and starts megatron_slm.pretrain on them.
#
#   launch ARGUMENTS...      all arguments of megatron_slm.pretrain, or of the program in program[]
#
# One node                   bash examples/RECIPE.sh
# Several, without Slurm     on each:  NODES=4 NODE_RANK=0..3 MASTER_ADDR=node0 bash examples/RECIPE.sh
# Slurm                      sbatch --nodes 4 --ntasks-per-node 1 --gpus-per-node 8 --exclusive \
#                                --signal B:USR1@600 --requeue --open-mode append \
#                                --wrap "REQUEUE=1 exec bash examples/RECIPE.sh"
#                            (a recipe given to sbatch itself would be copied away from this file)
# Only print the command     DRY_RUN=1 bash examples/RECIPE.sh
#
# Variables, set in the environment, with their defaults:
#
#   NODES          nodes of the job; the default is Slurm's number under Slurm, else the recipe's
#   GPUS_PER_NODE  8
#   RANKS_PER_NODE GPUS_PER_NODE; set it together with GPUS_PER_NODE=0 on nodes without GPUs
#   NODE_RANK      0: number of this node, without Slurm
#   MASTER_ADDR    localhost, or the job's first node under Slurm: a name or address by which the
#                  other nodes reach the node of rank 0
#   MASTER_PORT    29500: port of the rendezvous on MASTER_ADDR
#   NODE_ADDR      this node's address, if others cannot reach the one that its name stands for;
#                  expanded on each node, so '$(hostname -s)-ib' works under Slurm
#   MAX_RESTARTS   3: how often a failing rank restarts all ranks from the last checkpoint
#   REQUEUE        0; with 1, Slurm queues the job again when USR1 has ended it.  The batch script
#                  calls scontrol outside the container; the B: of --signal sends USR1 to it
#   CHECK          1: check the nodes before the start; 0: do not
#   PYTHON_ENV     shell command that sets up Python on a node.  Default: the node's Python if it has
#                  megatron_slm, else this repository's .venv, which tools/environment.sh makes
#                  (use_environment cuda; or use_environment container in NVIDIA's)
#   SRUN           options of srun, for example --container-image ... --container-mounts ...
#   EXTRA          further arguments, which override the recipe's.  SRUN and EXTRA are split into
#                  words as a shell does, with quotes; nothing in them is expanded or run
#   NCCL_*, TORCH_*, CUDA_*, GLOO_*, UCX_*   passed on; set NCCL_SOCKET_IFNAME and NCCL_IB_HCA if a
#                  node has several networks
#   CUDA_DEVICE_MAX_CONNECTIONS 1, NCCL_DEBUG WARN, TORCH_NCCL_ASYNC_ERROR_HANDLING 1,
#   TORCH_NCCL_AVOID_RECORD_STREAMS 1, TORCH_DISABLE_SHARE_RDZV_TCP_STORE 1,
#   PYTORCH_CUDA_ALLOC_CONF expandable_segments:True
#   OMP_NUM_THREADS        4: threads of a rank on the CPU
#   PET_SIGNALS_TO_HANDLE  SIGINT,SIGHUP,SIGQUIT: signals on which torchrun ends its ranks; this
#                          script handles the others
#
# On SIGTERM, and on USR1, which Slurm's --signal sends 600 s before the time limit, the ranks finish
# their step, save a checkpoint and exit successfully; the same command then continues from there.
# SIGTERM may be sent to this script or to all of its processes.  Nothing here kills a rank before it
# has saved, so the scheduler has to wait: set GraceTime on Slurm's partitions (KillWait for scancel)
# or Kubernetes' terminationGracePeriodSeconds.  sbatch --requeue has Slurm restart a job that lost a
# node or was preempted.

NODES="${SLURM_JOB_NUM_NODES:-${NODES:-1}}"
: "${GPUS_PER_NODE:=8}" "${NODE_RANK:=0}" "${MASTER_PORT:=29500}" "${MAX_RESTARTS:=3}" "${CHECK:=1}"
: "${DRY_RUN:=0}" "${EXTRA:=}" "${SRUN:=}" "${NODE_ADDR:=}" "${REQUEUE:=0}"

export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # Megatron's overlap needs it
# Without this, restarted ranks would find the previous ranks' addresses in the store (torch 2.15).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
export TORCH_NCCL_AVOID_RECORD_STREAMS="${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}"
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
# torchrun would kill its ranks within 30 s of a SIGTERM.  This variable is its --signals-to-handle,
# an option that torch before 2.9 does not have.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGINT,SIGHUP,SIGQUIT}"

program=(-m megatron_slm.pretrain)
may_be_killed=0 # 1 for a program that loses nothing when it is killed
slm_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

_refuse() {
    echo "error: $(hostname): $*" >&2
    exit 2
}

# Sets words[] to the words of a variable's value; quotes group words, and nothing is expanded.
_read_words() {
    local found
    found="$(xargs -r printf '%s\n' <<< "${!1}")" || _refuse "a quote is not closed in $1: ${!1}"
    words=()
    [ -z "$found" ] || mapfile -t words <<< "$found"
}

# Run from /, so that the current directory does not count as installed.
_has_megatron_slm() {
    (cd / && python -c 'import megatron_slm') 2>/dev/null
}

# Checks that some device matches a list in NCCL's format: prefixes; names after "="; or exclusions
# after "^", which are not checked.
_check_names() {
    local value="${!1:-}" rest='*' name
    [[ -n "$value" && "$value" != ^* ]] || return 0
    [[ "$value" != =* ]] || rest=""
    for name in $(tr , ' ' <<< "${value#=}"); do
        ! compgen -G "$2/${name%%:*}$rest" >/dev/null || return 0
    done
    wrong+=("$1 names no $3: $value")
}

# Leaves words out of the command.
_leave_out() {
    local word kept=()
    for word in "${torchrun[@]}"; do
        [[ " $* " == *" $word "* ]] || kept+=("$word")
    done
    torchrun=("${kept[@]}")
}

# Without Transformer Engine experts compute one after another, in plain torch.
_check_kernels() {
    [[ " ${torchrun[*]} " == *" --moe-"* ]] || return 0
    python -c 'import transformer_engine' 2>/dev/null ||
        _leave_out --moe-grouped-gemm --moe-permute-fusion
}

# Megatron's distributed optimizer can only resume with the Adam of Transformer Engine or Apex.  On a
# single rank there is nothing to distribute, so the option is dropped.
_check_optimizer() {
    [[ " ${torchrun[*]} " == *" --use-distributed-optimizer "* ]] || return 0
    ! python -c 'try: from transformer_engine.pytorch.optimizers import FusedAdam
except ImportError: from apex.optimizers import FusedAdam' 2>/dev/null || return 0
    if [ $((NODES * ranks_per_node)) -gt 1 ]; then
        wrong+=("--use-distributed-optimizer needs Transformer Engine or Apex, and Python has \
neither: see use_environment cuda and container in tools/environment.sh")
        return
    fi
    _leave_out --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable \
        --overlap-param-gather
    echo "note: without Transformer Engine or Apex there is no distributed optimizer, which one GPU \
does not need; layers are of plain torch, to try things out" >&2
}

# Reports the most frequent mistakes, all at once, before they cost minutes.
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
    # is_host is given, since a node may not recognise the name that others use for it.
    torchrun=(torchrun --nnodes="$NODES" --nproc-per-node="$ranks_per_node" --rdzv-backend=c10d
        --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv-id="${SLURM_JOB_ID:-slm}"
        --rdzv-conf="is_host=$((NODE_RANK == 0))" --max-restarts="$MAX_RESTARTS")
    eval "NODE_ADDR=\"$NODE_ADDR\""
    [ -z "$NODE_ADDR" ] || torchrun+=(--local-addr="$NODE_ADDR")
    _read_words EXTRA
    torchrun+=("${program[@]}" "$@" "${words[@]}")
}

# Sends one SIGTERM to each rank, once the rank has a handler: before that it would be ignored.
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

# Waits for a process and sets its status.  A signal ends `wait` early, so it is called repeatedly.
_wait_for() {
    while kill -0 "$1" 2>/dev/null; do wait "$1" || true; done
    status=0
    wait "$1" || status=$?
}

# Runs on every node.  torchrun ignores the signals; this script passes them to the ranks.
_run_node() {
    # shellcheck disable=SC1091
    if [ -n "${PYTHON_ENV:-}" ]; then
        set +u # activation scripts often read variables that are not set
        eval "$PYTHON_ENV" || _refuse "PYTHON_ENV fails: $PYTHON_ENV"
        set -u
    elif [ -f "$slm_root/.venv/bin/activate" ] && ! _has_megatron_slm; then
        source "$slm_root/.venv/bin/activate"
    fi
    _check_kernels
    if [ "$CHECK" = 1 ]; then _check_node; fi
    (trap '' TERM USR1 && exec "${torchrun[@]}") &
    started=$!
    trap '_notice TERM' TERM
    trap '_notice USR1' USR1
    _wait_for "$started"
    if [[ "$may_be_killed" = 1 && -n "$noticed" ]]; then status=0; fi
}

# Runs in the batch script: starts the recipe on every node as one step, to which srun passes
# signals on.
_run_step() {
    export MASTER_ADDR
    _read_words SRUN
    # Since Slurm 22.05 srun no longer inherits this, and would bind all ranks of a node to one core.
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

# Otherwise this is the batch script, or salloc's shell, which some versions of Slurm call a step.
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
