#!/usr/bin/env bash
# A GPU's verdict: build, tests on the device, memory and race checkers, benchmarks. Needs no network, and no git.
#
#   benchmarks/gpu_report.sh OUT_DIR [--quick] [--wheels DIR] [--stage NAME]...
#
# Stages: environment, build, cuda (the tests of that backend), triton (of that), tests (all), sanitizer, profile,
# benchmarks. Each has a time limit, below 9 minutes, at which whatever it started is ended; one that fails is recorded
# and the next still runs. --quick leaves out tests and profile, and fits in 8 minutes. --wheels names a folder with
# wheels of peers to install, without their dependencies. What is written to OUT_DIR: a log for each stage, tests-*.xml,
# sanitizer-*.log, profile-*.csv, the benchmarks' JSON and plots, and summary.md.
set -uo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
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

python=${PYTHON:-python3}
# In place: the sources of this tree, without an install.
tree=$PWD site=$out/site
mkdir -p "$site/fastkd"
for entry in fastkd/*; do ln -sfn "$tree/$entry" "$site/fastkd/"; done
ln -sfn "$tree/kernels" "$site/fastkd/kernels"
ln -sfn "$tree/benchmarks" "$site/fastkd/bench"
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
# What Triton has compiled once is there for the stages that follow.
export TRITON_CACHE_DIR=$out/triton-cache

gpu() { nvidia-smi --query-gpu="$1" --format=csv,noheader | head -n 1; }

environment() {
    nvidia-smi
    "$python" -c 'import sys, torch; print(sys.version); print(torch.__config__.show())'
    nvcc --version
    git describe --always --dirty || echo "no git, or no repository of it"
    "$python" -m fastkd info
}

build() {
    local arch
    if [[ -n $wheels ]]; then "$python" -m pip install --no-deps --no-index "$wheels"/*.whl || return; fi
    arch=$(gpu compute_cap) || return
    # Where there is no pyproject.toml, beside which an older setuptools refuses to run.
    cd "$site" && rm -f fastkd/*.so && ln -sfn "$tree/csrc" "$tree/setup.py" . || return
    FASTKD_REQUIRE=cpu,cuda FASTKD_CUDA_ARCHS=${arch/./} "$python" setup.py build_ext --inplace || return
    cp fastkd/*.so "$tree/fastkd/"  # for stages that are run later
}

# Tests on the device, eight at a time; one that hangs is given up, where pytest has the plugins for that.
run_tests() {
    local name=$1 plugins=()
    shift
    "$python" -c 'import xdist' && plugins+=(-n 8)
    "$python" -c 'import pytest_timeout' && plugins+=(--timeout=120)
    "$python" -m pytest -q -p no:cacheprovider "${plugins[@]}" --junitxml="$out/tests-$name.xml" "$@"
}
cuda() { run_tests cuda tests/gpu tests/backends -k cuda; }
triton() { run_tests triton tests/gpu tests/backends -k triton; }
tests() { run_tests all tests; }

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
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 1 \
                "$python" tests/gpu/sanitize.py $backend ${quick:+--quick} >"$out/sanitizer-$backend-$tool.log" 2>&1 &
            jobs+=("$!:$backend $tool")
        done
    done
    for job in "${jobs[@]}"; do
        if wait "${job%%:*}"; then echo "${job#*:}: passed"; else echo "${job#*:}: failed"; status=1; fi
    done
    return $status
}

# What the cost model predicts, counted: instructions, exponentials and bytes of one call.
profile() {
    local status=0 backend
    for backend in cuda triton; do
        ncu --clock-control none --csv --kernel-name regex:kd_rows --metrics "$metrics" \
            "$python" benchmarks/one_call.py "$backend" >"$out/profile-$backend.csv" || status=1
        tail -n 60 "$out/profile-$backend.csv"
    done
    return $status
}
metrics=gpu__time_duration.sum,smsp__inst_executed.sum,smsp__inst_executed_pipe_xu.sum,dram__bytes_read.sum
metrics+=,dram__bytes_write.sum,launch__registers_per_thread,sm__warps_active.avg.pct_of_peak_sustained_active
metrics+=,smsp__issue_active.avg.pct_of_peak_sustained_active

benchmarks() {
    local name options
    name=$(gpu name) || return
    # Interrupted in time to show and draw what it has.
    [[ -n $quick ]] && options=(--seconds=1) || options=(--full)
    timeout --signal=INT $((limit - 15)) "$python" -m fastkd bench "${options[@]}" --out "$out/cuda-${name// /-}.json"
}

# Ends every process that a stage left, in whichever group or session it is.
end_stage() {
    local entry
    for entry in /proc/[0-9]*; do
        if grep -qsxz "GPU_REPORT_STAGE=$1" "$entry/environ"; then kill -KILL "${entry#/proc/}"; fi
    done 2>/dev/null
}

printf '| stage | result | seconds |\n|---|---|---|\n' >"$out/summary.md"
for stage in "${stages[@]}"; do
    limit=${limits[$stage]:?no stage $stage here}
    start=$SECONDS
    export -f "${stage?}" gpu run_tests
    export out quick wheels python tree site limit metrics
    GPU_REPORT_STAGE=$$-$stage timeout --kill-after=1 "$limit" bash -uo pipefail -c "$stage" >"$out/$stage.log" 2>&1
    status=$?
    end_stage "$$-$stage"
    case $status in 0) result=passed ;; 124 | 137) result="out of time ($limit s)" ;; *) result="failed ($status)" ;; esac
    echo "| $stage | $result | $((SECONDS - start)) |" | tee -a "$out/summary.md"
done
rm -rf "$site"
{
    for stage in "${stages[@]}"; do
        [[ $stage == environment || ! -s $out/$stage.log ]] ||
            printf '\n## %s\n\n```\n%s\n```\n' "$stage" "$(tail -n 60 "$out/$stage.log")"
    done
} >>"$out/summary.md"
