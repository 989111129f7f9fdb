#!/usr/bin/env bash
# A GPU's verdict: build, tests on the device, memory and race checkers, benchmarks. Needs no network, and no git.
#
#   benchmarks/gpu_report.sh OUT_DIR [--quick] [--wheels DIR] [--stage NAME]...
#
# Stages: environment, build, cuda (the tests of that backend), triton (of that), tests (all), sanitizer, profile,
# benchmarks. Each has a time limit, below 9 minutes, at which whatever it started is ended. One that fails is recorded,
# the next still runs, and the exit status is 1. --quick leaves out tests and profile, and fits in 8 minutes. --wheels
# names a folder with wheels of peers to install, without their dependencies. What is written to OUT_DIR: a log for each
# stage, tests-*.xml, sanitizer-*.log, profile-*.csv, the benchmarks' JSON and plots, and summary.md.
set -uo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,10s/^# \{0,1\}//p' benchmarks/gpu_report.sh; exit 2; }
[[ $# -ge 1 && $1 != -* ]] || usage
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
quick="" wheels="" stages=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --quick) quick=1 ;;
        --wheels) wheels=${2:?}; shift ;;
        --stage) stages+=("${2:?}"); shift ;;
        *) usage ;;
    esac
    shift
done
# Seconds. The quick ones add up to less than 8 minutes; a test holds them to it.
declare -A limits=([environment]=30 [build]=120 [cuda]=80 [triton]=65 [sanitizer]=80 [benchmarks]=95)
order=(environment build cuda triton sanitizer benchmarks)
if [[ -z $quick ]]; then
    limits=([environment]=60 [build]=500 [cuda]=500 [triton]=500 [tests]=500 [sanitizer]=500 [profile]=300 [benchmarks]=500)
    order=(environment build cuda triton tests sanitizer profile benchmarks)
fi
[[ ${#stages[@]} -gt 0 ]] || stages=("${order[@]}")
for stage in "${stages[@]}"; do : "${limits[$stage]:?no stage $stage here}"; done

python=${PYTHON:-python3}
# In place: the sources of this tree, without an install.
tree=$PWD site=$out/site
mkdir -p "$site/fastkd"
for entry in fastkd/*; do ln -sfn "$tree/$entry" "$site/fastkd/"; done
ln -sfn "$tree/kernels" "$site/fastkd/kernels"
ln -sfn "$tree/benchmarks" "$site/fastkd/bench"
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
# What Triton has compiled once is there for the stages that follow.
export TRITON_CACHE_DIR=$tree/build/triton-cache

gpu() { nvidia-smi --query-gpu="$1" --format=csv,noheader | head -n 1; }

# PyTorch's own word on the GPU, or its failure.
torch_gpu() { "$python" -c 'import torch; print(torch.cuda.get_device_properties(0))'; }

# What takes too long is interrupted in time to show what it has: 15 s before the stage's limit.
in_time() {
    local left=$((limit - 15 - SECONDS))
    timeout --signal=INT $((left > 1 ? left : 1)) "$@"
}

environment() {
    nvidia-smi
    nvcc --version
    git describe --always --dirty 2>/dev/null || echo "no git, or no repository of it"
    "$python" -m fastkd info
    torch_gpu
}

build() {
    local arch
    if [[ -n $wheels ]]; then "$python" -m pip install --no-deps --no-index "$wheels"/*.whl || return; fi
    arch=$(gpu compute_cap) || return
    # Where there is no pyproject.toml, beside which an older setuptools refuses to run.
    cd "$site" && rm -f fastkd/*.so fastkd/_built.json && ln -sfn "$tree/csrc" "$tree/setup.py" . || return
    FASTKD_REQUIRE=cpu,cuda FASTKD_CUDA_ARCHS=${arch/./} "$python" setup.py build_ext --inplace --parallel 2 || return
    cp fastkd/*.so fastkd/_built.json "$tree/fastkd/" || return  # for stages that are run later
    "$python" -c 'from fastkd import _built, _cpu, _cuda; print(_built.targets())'
}

# Tests on the device, eight at a time; one that hangs is given up with its process, since what waits for a kernel heeds
# no signal. Both where pytest has the plugins for that.
run_tests() {
    local name=$1 plugins=()
    shift
    torch_gpu || return  # without one they would pass on the CPU
    "$python" -c 'import xdist' 2>/dev/null && plugins+=(-n 8)
    "$python" -c 'import pytest_timeout' 2>/dev/null && plugins+=(--timeout=120 --timeout-method=thread)
    in_time "$python" -m pytest -q -rsfE -p no:cacheprovider "${plugins[@]}" --junitxml="$out/tests-$name.xml" "$@" &&
        grep -q '<testcase [^>]*/>' "$out/tests-$name.xml"  # one that passed, which has nothing to add
}
cuda() { run_tests cuda tests/gpu tests/backends -k cuda; }
triton() { run_tests triton tests/gpu tests/backends -k triton; }
tests() { FASTKD_REQUIRE=cpu,cuda run_tests all tests; }

# The tools side by side: they leave the GPU idle most of the time.
sanitizer() {
    local status=0 backend tool columns job jobs=()
    # Compiled before the tools slow everything down.
    for columns in 7 1000 4099 70001; do
        timeout $((limit / 2)) "$python" tests/gpu/sanitize.py triton $columns ${quick:+--quick} &
        jobs+=($!)
    done
    wait "${jobs[@]}"
    jobs=()
    for backend in cuda triton; do
        for tool in memcheck racecheck; do
            sanitize $backend $tool &
            jobs+=($!)
        done
    done
    for job in "${jobs[@]}"; do wait "$job" || status=1; done
    return $status
}

sanitize() {
    local log=$out/sanitizer-$1-$2.log
    if PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$2" --error-exitcode 1 \
        "$python" tests/gpu/sanitize.py "$1" ${quick:+--quick} >"$log" 2>&1; then
        echo "$1 $2: passed"
    else
        printf '%s\n%s\n' "$(tail -n 12 "$log")" "$1 $2: failed"
        return 1
    fi
}

# What the cost model predicts, counted: instructions, exponentials and bytes of one call.
profile() {
    local status=0 backend table kernels
    for backend in cuda triton; do
        table=$out/profile-$backend.csv
        ncu --clock-control none --csv --page raw --kernel-name regex:kd_rows --metrics "$metrics" \
            "$python" benchmarks/one_call.py "$backend" >"$table" || status=1
        grep '^"' "$table"
        kernels=$(grep -c '^"[0-9]' "$table") || status=1  # none where the counters may not be read, and ncu succeeds
        echo "$backend: $kernels kernels"
    done
    return $status
}
metrics=gpu__time_duration.sum,smsp__inst_executed.sum,smsp__inst_executed_pipe_xu.sum,dram__bytes_read.sum
metrics+=,dram__bytes_write.sum,launch__registers_per_thread,sm__warps_active.avg.pct_of_peak_sustained_active
metrics+=,smsp__issue_active.avg.pct_of_peak_sustained_active

benchmarks() {
    local name options
    name=$(gpu name) || return
    [[ -n $quick ]] && options=(--seconds=1) || options=(--full)
    in_time "$python" -m fastkd bench --device cuda "${options[@]}" --out "$out/cuda-${name// /-}.json"
}

# Ends every process that a stage left, in whichever group or session it is.
end_stage() {
    local found entry
    for _ in {1..50}; do  # one may have begun another meanwhile; and some do not end at once
        found=$(grep -lsxz "GPU_REPORT_STAGE=$1" /proc/[0-9]*/environ)
        [[ -n $found ]] || return 0
        for entry in $found; do kill -KILL "$(basename "${entry%/environ}")" 2>/dev/null; done
        sleep 0.1
    done
}

trap 'end_stage "$$-$stage"; rm -rf "$site"' EXIT
failed=0
printf '| stage | result | seconds | last line |\n|---|---|---|---|\n' >"$out/summary.md"
for stage in "${stages[@]}"; do
    limit=${limits[$stage]}
    start=$SECONDS
    export -f "${stage?}" gpu torch_gpu in_time run_tests sanitize
    export out quick wheels python tree site limit metrics
    # In the background, so that a signal is not put off until the stage ends.
    GPU_REPORT_STAGE=$$-$stage timeout --kill-after=1 "$limit" bash -uo pipefail -c "$stage" >"$out/$stage.log" 2>&1 &
    wait $!
    status=$?
    end_stage "$$-$stage"
    case $status in 0) result=passed ;; 124 | 137) result="out of time ($limit s)" ;; *) result="failed ($status)" ;; esac
    [[ $status == 0 ]] || failed=1
    echo "| $stage | $result | $((SECONDS - start)) | $(tail -n 1 "$out/$stage.log") |" | tee -a "$out/summary.md"
done
for stage in "${stages[@]}"; do
    printf '\n## %s\n\n```\n%s\n```\n' "$stage" "$(tail -n 60 "$out/$stage.log")"
done >>"$out/summary.md"
exit $failed
