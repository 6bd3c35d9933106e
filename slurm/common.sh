# shellcheck shell=bash
# What the batch scripts share: `start ARGUMENTS` runs launcher/$program.py (pretrain) on every process of the allocation
# and starts the job again when it has to go on. Sourced, with `root` as the clone.

# A request to stop can come at any moment: Slurm sends USR1 to the batch script ahead of the time limit (--signal),
# TERM when it ends the job. The processes get USR1 from us, since srun takes a TERM for an order to kill them.
asked=""  # the signal that asked this job to stop
task_pid=""
interrupted=""
ask_to_stop() {
    asked=$1 interrupted=1
    echo "$(date +%FT%T) $1: the run is asked to save a checkpoint and stop"
    if [[ -n $task_pid ]]; then kill -USR1 "$task_pid" 2>/dev/null; fi
}
trap 'ask_to_stop USR1' USR1
trap 'ask_to_stop TERM' TERM
root=$(cd "$root" && pwd)

say() { echo "$(date +%FT%T) $*"; }

fail() {
    echo "error: $*" >&2
    exit 2
}

# The comment at the head of the batch script, which explains it.
show_help() {
    sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//p}' "$0"
    exit 0
}

# Launch, wait, and decide what the job's end means. Exits.
start() {
    read_arguments "$@"
    read_allocation
    prepare_environment
    build_command
    check_config
    if [[ -n $dry_run ]]; then
        print_launch
        return
    fi
    mkdir -p "$logs" && : >"$logs/srun.log" || fail "cannot write the logs to $logs: set S2MOE_LOGS"
    print_launch
    local status=0
    if [[ -z $asked ]]; then
        "${command[@]}" 2>"$logs/srun.log" &
        task_pid=$!
        while :; do # a signal ends `wait` before the processes have ended
            interrupted=""
            wait "$task_pid" && status=0 || status=$?
            if [[ -z $interrupted ]]; then break; fi
        done
    fi
    finish "$status"
}

# Take our own options out of the arguments; the rest is the program's. Outside a job, --dry-run takes the
# shape that sbatch would be given.
read_arguments() {
    dry_run=""
    arguments=()
    local option value shape=(nodes ntasks-per-node gpus-per-node cpus-per-task)
    while (($#)); do
        case $1 in # sbatch's short forms: -N 2, -N2
            -N | -c) set -- "$([[ $1 == -N ]] && echo --nodes || echo --cpus-per-task)" "${@:2}" ;;
            -N[0-9]*) set -- "--nodes=${1#-N}" "${@:2}" ;;
            -c[0-9]*) set -- "--cpus-per-task=${1#-c}" "${@:2}" ;;
        esac
        option=${1%%=*} value=""
        if [[ $1 == --dry-run ]]; then
            dry_run=1
        elif [[ $1 == --help || $1 == -h ]]; then
            show_help
        elif [[ $1 == --config ]]; then
            arguments+=("$1" "${2:-}") && shift
        elif [[ $option == --* && " ${shape[*]} " == *" ${option#--} "* ]]; then
            if [[ $1 == *=* ]]; then value=${1#*=}; else value=${2:-} && shift; fi
            if [[ $option == --gpus-per-node ]]; then value=${value##*:}; fi # a100:4
            [[ $value =~ ^[1-9][0-9]*$ ]] || fail "$option: must be a number, got '$value'"
            [[ -z ${SLURM_JOB_ID:-} ]] || fail "$option is an option of sbatch: give it before the script"
            case $option in
                --nodes) SLURM_JOB_NUM_NODES=$value ;;
                --ntasks-per-node) SLURM_NTASKS_PER_NODE=$value ;;
                --gpus-per-node) SLURM_GPUS_ON_NODE=$value ;;
                --cpus-per-task) SLURM_CPUS_PER_TASK=$value ;;
            esac
        elif [[ $1 == -* && $option != --config ]]; then
            fail "$option is not an option of launcher/${program:-pretrain}.py in a job: options of sbatch stand" \
                "before the script; --help explains"
        else
            arguments+=("$1")
        fi
        shift
    done
    [[ -n $dry_run || -n ${SLURM_JOB_ID:-} ]] ||
        fail "submit this script: sbatch slurm/..., or add --dry-run to see what it would launch"
}

# nodes, tasks (per node: one a GPU, or what --ntasks-per-node says), cpus (per task), job (its name for people).
read_allocation() {
    nodes=${SLURM_JOB_NUM_NODES:-1}
    local gpus=${SLURM_GPUS_ON_NODE:-0}
    tasks=${SLURM_NTASKS_PER_NODE:-}
    if [[ -z $tasks && ${SLURM_NTASKS:-0} -gt $nodes ]]; then
        ((SLURM_NTASKS % nodes == 0)) ||
            fail "--ntasks=$SLURM_NTASKS cannot be dealt to $nodes nodes: give --ntasks-per-node instead"
        tasks=$((SLURM_NTASKS / nodes))
    fi
    tasks=${tasks:-$((gpus > 0 ? gpus : 1))}
    job=${SLURM_JOB_ID:-0}
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then # by its own number an element may name the whole array
        job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
    fi
    if ((gpus > 0 && tasks != gpus)); then
        say "warning: $tasks processes on each node for $gpus GPUs; --ntasks-per-node=$gpus starts one for each"
    fi
    cpus=${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-$tasks} / tasks))}
    ((cpus > 0)) || fail "the job has ${SLURM_CPUS_ON_NODE:-0} CPUs on a node for $tasks processes:" \
        "submit with --ntasks-per-node=$tasks --cpus-per-task=N"
}

# Variables of the processes. The site's file comes last but for the address, so that it decides.
prepare_environment() {
    unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT # of whoever submitted
    export OMP_NUM_THREADS=$cpus PYTHONUNBUFFERED=1
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    local site=${S2MOE_SITE:-$root/slurm/site.sh}
    if [[ -e $site ]]; then
        # shellcheck source=/dev/null
        source "$site" || fail "$site failed"
    elif [[ -n ${S2MOE_SITE:-} ]]; then
        fail "S2MOE_SITE: there is no file $site"
    fi
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        local hosts
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || fail "scontrol cannot read $SLURM_JOB_NODELIST"
        MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
        MASTER_PORT=${MASTER_PORT:-$(free_port "$SLURM_JOB_ID")}
    fi
    export MASTER_ADDR=${MASTER_ADDR:-FIRST_HOST_OF_THE_JOB} MASTER_PORT=${MASTER_PORT:-PORT_FROM_THE_JOB_NUMBER}
}

# A port for the processes to meet at on this node, the job's first. Jobs that share the node begin at different ones,
# all below 32768, where Linux gives no connection a port by itself; one that somebody listens on is passed over.
free_port() {
    local port=$((10000 + $1 % 20000)) tried
    for ((tried = 0; tried < 100; tried++)); do
        local listening
        listening="^ *[0-9]+: [0-9A-F]+:$(printf %04X "$port") [0-9A-F]+:0000 0A"
        if ! grep -qsiE "$listening" /proc/net/tcp /proc/net/tcp6; then break; fi
        port=$((10000 + (port - 10000 + 4999) % 20000))
    done
    echo "$port"
}

# command: the srun line, as an array. logs: the directory of the ranks' logs.
build_command() {
    local container=() options=() python=${S2MOE_PYTHON:-}
    read -ra container <<<"${S2MOE_CONTAINER:-}"
    read -ra options <<<"${S2MOE_SRUN_OPTIONS:-}"
    if [[ -z $python ]]; then
        python=python3
        if [[ -z ${container[*]}${options[*]} && -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; fi
    fi
    logs=${S2MOE_LOGS:-logs}/${SLURM_JOB_NAME:-${job_name:-${program:-pretrain}}}-$job
    command=(
        srun --nodes="$nodes" --ntasks="$((nodes * tasks))" --ntasks-per-node="$tasks" --cpus-per-task="$cpus"
        --kill-on-bad-exit=1 --output="$logs/rank-%t.log" --open-mode=append
        "${options[@]}" "${container[@]}" "$python" "$root/launcher/${program:-pretrain}.py" "${arguments[@]}"
    )
}

# A configuration file that is not there is said before anything is launched. What a container sees is its own.
check_config() {
    local number config="" given=""
    for ((number = 0; number < ${#arguments[@]}; number++)); do
        case ${arguments[number]} in
            --config) config=${arguments[number + 1]:-} given=1 ;;
            --config=*) config=${arguments[number]#*=} given=1 ;;
        esac
    done
    [[ -n $given ]] || fail "--config is missing; for example --config configs/quickstart.yaml"
    [[ -f $config || -n ${S2MOE_CONTAINER:-}${S2MOE_SRUN_OPTIONS:-} ]] ||
        fail "--config: there is no file '$config' (seen from $PWD)"
}

print_launch() {
    local name
    say "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)): $nodes nodes x $tasks processes x $cpus threads"
    for name in MASTER_ADDR MASTER_PORT OMP_NUM_THREADS PYTHONUNBUFFERED ${!NCCL_@} ${!GLOO_@} ${!TORCH_NCCL_@} \
        CUDA_VISIBLE_DEVICES DS_ACCELERATOR; do
        if [[ -n ${!name:-} ]]; then printf '  %s=%q\n' "$name" "${!name}"; fi
    done
    printf '  %s' "$(printf '%q ' "${command[@]}")"
    echo
}

# What the end of the processes means for the job. Exit statuses are those of launcher/pretrain.py; srun gives the highest,
# and that may be of a process that it killed, or that lost its fellow, because another one had failed.
finish() {
    local status=$1 own
    cat "$logs/srun.log" >&2
    own=$(failed_by_itself)
    case ${own:-$status} in
        0)
            if [[ -z $asked || -n $task_pid ]]; then exit 0; fi
            ;; # asked to stop before the processes began
        2 | 3)
            show_errors
            say "the run ended with status ${own:-$status}: not started again, since that would end the same way"
            exit "${own:-$status}"
            ;;
        75) ;;
        130)
            say "the run was interrupted, so it is not started again; the same sbatch command continues it"
            exit 130
            ;;
        *) show_errors ;;
    esac
    leave_to_slurm
    if [[ $status != 75 && -z $asked ]]; then count_restart "$status"; fi
    requeue
}

# 2 or 3 where a process ended so: srun tells each one's status, whatever it did to the others afterwards.
failed_by_itself() {
    sed -nE 's/.*: Exited with exit code ([23])$/\1/p' "$logs/srun.log" | sort | head -n 1
}

# The last messages of the ranks, once each.
show_errors() {
    tail -qn 40 "$logs"/rank-*.log 2>/dev/null | grep -E '(^|\] )error: |Error: |out of memory' | sort -u | head -n 10
    echo "(the whole output of every rank: $logs/rank-*.log)"
}

# A process was lost: start again, but not forever. The count lies beside the logs and outlives the requeue; it begins
# anew where this start had another checkpoint to continue from than the last one that lost a process.
count_restart() {
    local most=${S2MOE_MAX_RESTARTS:-3} count=0 before="" place
    place=$(grep -ahoE 'continuing from .*, step [0-9]+' "$logs/rank-0.log" 2>/dev/null | tail -n 1)
    if [[ -e $logs/restarts ]]; then { read -r count && read -r before; } <"$logs/restarts"; fi
    if [[ $place != "$before" ]]; then count=0; fi
    if ((count >= most)); then
        say "a process was lost (status $1), and so it was in $count starts before: giving up. The same sbatch" \
            "command continues from the last checkpoint; S2MOE_MAX_RESTARTS allows more starts"
        exit "$1"
    fi
    printf '%s\n' $((count + 1)) "$place" >"$logs/restarts"
    say "a process was lost (status $1): restart $((count + 1)) of $most"
}

# Exit if Slurm ends this job for another reason than its time: somebody cancelled it, or Slurm requeues it by itself
# (preemption, a lost node).
leave_to_slurm() {
    local state
    state=$(scontrol show job -o "$job" 2>/dev/null)
    if [[ $state != *JobState=RUNNING* && $state != *Reason=TimeLimit* ]]; then
        say "Slurm ends this job, so it is not requeued from here; the same sbatch command continues the run"
        exit 75
    fi
}

requeue() {
    if scontrol requeue "$job"; then
        say "requeued; the run continues from its newest checkpoint"
        exit 0
    fi
    say "this job cannot be requeued; the same sbatch command continues the run"
    exit 75
}
