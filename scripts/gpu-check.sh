#!/usr/bin/env bash
# What only a GPU can show, in one call of a few minutes: right results on every kernel that the driver can run, and
# measurements. The GPU machine needs x86-64 Linux, the GPU's Vulkan driver and bash; no Rust, no Python, no network.
#
#   scripts/gpu-check.sh                    builds, checks this machine, writes gpu-check-NAME-TIME.tar.gz
#   scripts/gpu-check.sh --host USER@HOST   builds here, checks HOST over ssh, brings the archive back
#   scripts/gpu-check.sh --pack FILE.tar.gz everything for a machine that ssh does not reach: unpack it there and run
#                                           gpu-check/gpu-check.sh, which writes its archive where it was called
#
# Variables: SIZE=tiny measures networks that a software driver can run, in place of the real size, which takes 8 GB of disk
# and of memory on the GPU. STEPS=REGEX runs some steps. BUDGET=SECONDS for everything (1500): what is left then is skipped.
# RUNNER=PROGRAM starts everything through a program, such as target/lavapipe/run. PROFILE=dev packs a debug build.
set -euo pipefail
self=$(realpath "${BASH_SOURCE[0]}")
here=$(dirname "$self")

# The steps in their order: what says most about a GPU first, so that an end of time costs least.
steps=(machine devices ops replay check bench-pi0 golden modules networks answers coverage check-f32 check-int8
    bench-pi0-int8 bench-pi05 bench-pi0-fast demo demo-pi05 report)

# Binary, tests and the data that they read, in one folder.
pack() { # FOLDER
    local to=$1 profile=${PROFILE:-release} built test
    cd "$here/.."
    built=$profile
    [ "$profile" = dev ] && built=debug
    echo "building ($profile)"
    cargo build --locked -q -p pi0 --bin pi0 --profile "$profile"
    mkdir -p "$to/tests" "$to/golden" "$to/models"
    cp "target/$built/pi0" "$self" "$to/"
    cargo test --locked -p pi0-vulkan --profile "$profile" --no-run --test 'vulkan_*' 2>&1 | tee "$to/tests.log"
    # Cargo names what it built in brackets.
    sed -n 's/.*Executable.*(\(.*\))$/\1/p' "$to/tests.log" | while read -r test; do
        case $test in
        */vulkan_sources-* | */vulkan_paper-*) ;;
        *) cp "$test" "$to/tests/$(basename "${test%-*}")" ;;
        esac
    done
    rm "$to/tests.log"
    cp -r golden/b golden/c golden/d golden/f "$to/golden/"
    cp -r models/tiny models/demo models/demo-pi05 "$to/models/"
    { git describe --always --dirty 2>/dev/null || echo unknown; rustc --version; ldd --version 2>&1 | sed -n 1p; } >"$to/version"
}

# Runs all steps in a packed folder; leaves results/ and, however it ends, the archive.
check() { # FOLDER ARCHIVE
    cd "$1"
    archive=$2
    results=$PWD/results
    rm -rf "$results" cache
    mkdir -p "$results"
    export PI0_REQUIRE_VULKAN=1 PI0_REPOSITORY=$PWD XDG_CACHE_HOME=$PWD/cache TMPDIR=${TMPDIR:-/tmp}
    printf 'step\tseconds\tresult\n' >"$results/summary.tsv"
    trap finish EXIT
    trap 'exit 130' INT TERM
    # Built with a newer C library than this machine's, nothing would start: said once, not by every step.
    if ! ${RUNNER:-} ./pi0 --version >"$results/starts.log" 2>&1; then
        echo "the binary does not start here:"
        cat "$results/starts.log"
        exit 1
    fi
    began=$SECONDS number=0
    for name in "${steps[@]}"; do
        number=$((number + 1))
        if [[ $name =~ ${STEPS:-.} ]]; then step "$name"; fi
    done
    ! grep -qvE $'\t(ok|result)$' "$results/summary.tsv"
}

# One step: at most ten minutes, and no longer than the time that is left.
step() { # NAME
    local name=$1 rc=0 left=$((${BUDGET:-1500} - SECONDS + began)) start=$SECONDS what log
    log=$results/$(printf %02d "$number")-$name.log
    if [ "$left" -le 0 ]; then
        printf '%s\t0\tskipped: no time left\n' "$name" >>"$results/summary.tsv"
        return
    fi
    printf '[%2d/%d] %-16s' "$number" "${#steps[@]}" "$name"
    export -f run_step bench_full
    timeout -k 10 $((left < 600 ? left : 600)) bash -c 'run_step "$1"' - "$name" >"$log" 2>&1 || rc=$?
    case $rc in
    0) what=ok ;;
    124 | 137) what="no end in $((SECONDS - start)) s" ;;
    *) what="failed ($rc)" ;;
    esac
    printf '%5d s  %s\n' $((SECONDS - start)) "$what"
    printf '%s\t%s\t%s\n' "$name" $((SECONDS - start)) "$what" >>"$results/summary.tsv"
    [ $rc = 0 ] || tail -5 "$log" | sed 's/^/        /'
    # What a program was killed over stays until the next one wants it.
    [ $rc = 0 ] || rm -rf cache
}

# What a step runs; the log gets each command as it is run.
run_step() { # NAME
    local pi0="${RUNNER:-} ./pi0" repeat=20
    [ "${SIZE:-full}" = full ] || repeat=2
    set -ex
    case $1 in
    machine)
        cat version
        uname -a
        date -u
        nproc
        grep -m1 'model name' /proc/cpuinfo
        free -g || true
        nvidia-smi || true
        nvidia-smi -q -d CLOCK,POWER,PERFORMANCE || true
        lspci -nn | grep -Ei 'vga|3d|display' || true
        ;;
    devices)
        $pi0 devices --verbose
        $pi0 devices --json results/devices.json
        ;;
    # Every operation in every variant that this driver has; the tape; modules; whole networks; answers of π0-FAST.
    ops | replay | modules) ${RUNNER:-} tests/vulkan_"$1" --nocapture --test-threads=1 ;;
    networks) ${RUNNER:-} tests/vulkan_model --nocapture --test-threads=1 ;;
    answers) ${RUNNER:-} tests/vulkan_fast --nocapture --test-threads=1 ;;
    check) $pi0 check --device vulkan --json results/check.json ;;
    check-*) $pi0 check --device vulkan --dtype "${1#check-}" --json "results/$1.json" ;;
    coverage) $pi0 coverage --device vulkan --json results/coverage.json ;;
    # The same network, inputs and wanted actions on the host's processor and on the GPU.
    golden)
        for device in cpu vulkan; do
            $pi0 bench models/tiny --device $device --repeat 5 --inputs golden/c/cam2_short_b1.inputs.safetensors \
                --golden golden/c/cam2_short_b1.outputs.safetensors --json results/golden-$device.json
        done
        ;;
    bench-pi0) bench_full "$1" pi0 --cameras 2 --tokens 12 --repeat "$repeat" ;;
    bench-pi0-int8)
        bench_full "$1" pi0 --cameras 2 --tokens 12 --repeat "$repeat" --dtype int8
        rm -rf cache
        ;;
    bench-pi05)
        bench_full "$1" pi05 --cameras 3 --tokens 80 --repeat "$repeat"
        rm -rf cache
        ;;
    bench-pi0-fast)
        bench_full "$1" pi0-fast --cameras 3 --tokens 80 --steps 40 --repeat "$repeat"
        rm -rf cache
        ;;
    demo | demo-pi05)
        $pi0 demo models/"$1" --report results/"$1".json --episodes 20 --seed 1 --device vulkan
        grep -o '"successes": *[0-9]*' results/"$1".json
        ;;
    report)
        benches=
        for file in results/golden-vulkan.json results/bench-*.json; do
            [ -s "$file" ] && benches="$benches --bench $file"
        done
        $pi0 report --html results/report.html --check results/check.json --coverage results/coverage.json $benches
        ;;
    esac
}

# The time of each launch by the GPU's clock, shares of peak and bandwidth, the cost of an empty launch.
bench_full() { # NAME KIND ARGS...
    local name=$1 kind=$2
    shift 2
    ${RUNNER:-} ./pi0 bench --synth "${SIZE:-full}" --kind "$kind" "$@" --device vulkan --json "results/$name.json"
}

finish() {
    local rc=$?
    rm -rf cache
    tar czf "$archive" results
    echo
    column -t -s $'\t' "$results/summary.tsv" 2>/dev/null || cat "$results/summary.tsv"
    echo "$archive"
    exit $rc
}

archive=$PWD/gpu-check-$(uname -n)-$(date -u +%Y%m%dT%H%M%SZ).tar.gz
case ${1:-} in
-h | --help)
    sed -n '2,14s/^# \{0,1\}//p' "$self"
    exit
    ;;
"") [ -x "$here/tests/vulkan_ops" ] && { check "$here" "$archive"; exit; } ;;
--pack | --host) ;;
*)
    sed -n '2,14s/^# \{0,1\}//p' "$self"
    exit 2
    ;;
esac
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
(pack "$folder/gpu-check")
case ${1:-} in
--pack) tar czf "$(realpath -m "${2:?a file to write}")" -C "$folder" gpu-check ;;
--host)
    host=${2:?user and host}
    tar cz -C "$folder" gpu-check | ssh "$host" "rm -rf gpu-check && tar xz"
    settings=$(for name in SIZE STEPS BUDGET RUNNER; do printf '%s=%q ' $name "${!name:-}"; done)
    ssh "$host" "cd gpu-check && $settings ./gpu-check.sh" || echo "not all steps passed"
    ssh "$host" 'cat "$(ls -t gpu-check/gpu-check-*.tar.gz | head -1)"' >"$archive"
    echo "$archive"
    ;;
*) (check "$folder/gpu-check" "$archive") ;;
esac
