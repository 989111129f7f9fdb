#!/usr/bin/env bash
# A GPU's verdict: build, tests on the device, memory and race checkers, benchmarks. Needs no network.
#
#   benchmarks/gpu_report.sh OUT_DIR [--quick] [--wheels DIR] [--stage NAME]...
#
# Stages: environment, build, tests, sanitizer, benchmarks. Each has a time limit; one that fails is recorded and the
# next still runs. --quick fits in 8 minutes. --wheels names a folder with wheels of peers to install, without their
# dependencies. What is written to OUT_DIR: environment.txt, build.log, tests.xml, sanitizer-*.log, the benchmarks'
# JSON and plots, and summary.md.
set -uo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
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
[[ ${#stages[@]} -gt 0 ]] || stages=(environment build tests sanitizer benchmarks)
python=${PYTHON:-python3}
# In place: the sources of this tree, without an install.
site=$out/site
mkdir -p "$site/fastkd"
for entry in fastkd/*; do ln -sfn "$PWD/$entry" "$site/fastkd/"; done
ln -sfn "$PWD/kernels" "$site/fastkd/kernels"
ln -sfn "$PWD/benchmarks" "$site/fastkd/bench"
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1

environment() {
    nvidia-smi
    "$python" -c 'import sys, torch; print(sys.version); print(torch.__config__.show())'
    nvcc --version
    git describe --always --dirty
    "$python" -m fastkd info
}

build() {
    if [[ -n $wheels ]]; then "$python" -m pip install --no-deps --no-index "$wheels"/*.whl; fi
    local major_minor
    major_minor=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return
    FASTKD_REQUIRE=cpu,cuda FASTKD_CUDA_ARCHS=$major_minor "$python" setup.py build_ext --inplace || return
    ln -sf "$PWD"/fastkd/*.so "$site/fastkd/"
}

tests() {
    local subset=(tests/backends tests/gpu tests/test_autograd.py tests/test_functional.py tests/test_known_faults.py)
    [[ -n $quick ]] || subset=(tests)
    "$python" -m pytest -q -p no:cacheprovider --junitxml="$out/tests.xml" "${subset[@]}"
}

sanitizer() {
    local status=0 backend tool
    for backend in cuda triton; do
        for tool in memcheck racecheck; do
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout $((limit / 4)) compute-sanitizer --tool "$tool" --error-exitcode 1 \
                "$python" tests/gpu/sanitize.py "$backend" >"$out/sanitizer-$backend-$tool.log" 2>&1 || status=1
            echo "$backend $tool: $(tail -n 1 "$out/sanitizer-$backend-$tool.log")"
        done
    done
    return $status
}

benchmarks() {
    local name
    name=cuda-$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))') || return
    "$python" -m fastkd bench ${quick:---full} ${quick:+--seconds=1} --device cuda --out "$out/$name.json"
}

# Seconds; the quick ones add up to 8 minutes.
declare -A limits=([environment]=20 [build]=100 [tests]=160 [sanitizer]=80 [benchmarks]=120)
[[ -n $quick ]] || limits=([environment]=60 [build]=600 [tests]=1800 [sanitizer]=1200 [benchmarks]=1800)

printf '| stage | result | seconds |\n|---|---|---|\n' >"$out/summary.md"
for stage in "${stages[@]}"; do
    limit=${limits[$stage]:?unknown stage $stage}
    log=$out/$stage.log
    [[ $stage != environment ]] || log=$out/environment.txt
    start=$SECONDS
    export -f "${stage?}"
    export out quick wheels python site limit
    timeout "$limit" bash -uo pipefail -c "$stage" >"$log" 2>&1
    status=$?
    case $status in 0) result=passed ;; 124) result="out of time ($limit s)" ;; *) result="failed ($status)" ;; esac
    echo "| $stage | $result | $((SECONDS - start)) |" | tee -a "$out/summary.md"
done
rm -rf "$site"
{
    for log in tests sanitizer benchmarks; do
        [[ ! -s $out/$log.log ]] || printf '\n## %s\n\n```\n%s\n```\n' "$log" "$(tail -n 40 "$out/$log.log")"
    done
} >>"$out/summary.md"
