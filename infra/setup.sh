#!/usr/bin/env bash
# Everything between a clone and a running spiketrain: system packages, .venv, the package with what it needs.
# Safe to repeat: when nothing that matters has changed, it returns at once. The Dockerfile runs this same file.
#
#   infra/setup.sh              all of it
#   infra/setup.sh --system     only the system packages
#   infra/setup.sh --pictures   only the photographs that `spiketrain write stamps` is made of
#   infra/setup.sh --browser    only the browser that tests open reports in; neither setup nor the image installs it
#   infra/setup.sh --tools      only what tests read this folder with (shellcheck, docker-compose, promtool, kustomize); likewise
#   infra/setup.sh --servers    only what `make test-full` needs: PostgreSQL, Slurm's daemons, iproute2
#   infra/setup.sh --runtime    only the system packages that a finished .venv needs to run (the second stage of the image)
#
#   PYTHON=/path/to/python3.12  which interpreter; otherwise that of .venv, then python3, then python3.11 to python3.13
#   LOCKED=1                    exactly the releases of requirements.lock, each checked against its hash, what builds some of
#                               them included, instead of the newest that pyproject.toml admits. For images and for repeating
#                               a published result. Not for a torch built elsewhere than on PyPI (a vendor's, a CPU-only one):
#                               its hash is another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv
readonly STAMP=$VENV/setup-stamp
readonly RUNTIME_LIST=$VENV/runtime-packages

# FFCV is built from source against OpenCV and libjpeg-turbo, and loops in numba's TBB layer, which looks for the system's libtbb.
# The opencv-python that it asks for loads libGL.
readonly PACKAGES=(build-essential pkg-config libopencv-dev libturbojpeg0-dev libtbb12 libgl1)
readonly PICTURES=(tuxpaint-stamps-default mate-backgrounds plasma-workspace-wallpapers) # 260 MB: only when asked for
readonly BROWSERS=(chromium chromium-browser google-chrome) # the first is Debian's package; tests take any of them
readonly TOOLS=(shellcheck docker-compose)
readonly SERVERS=(postgresql slurmctld slurmd munge iproute2) # Debian's postgresql starts one of its own, which no test uses
readonly OPTIONAL=(dataset-fashion-mnist) # the images of the demo, where the distribution has them

main() {
    # Two runs at a time would install into one .venv: the second waits, then finds the work done.
    exec 9<infra/setup.sh
    if command -v flock >/dev/null; then flock 9; fi

    case "${1:-}" in
        "") is_current || install_everything ;;
        --system) install_system_packages ;;
        --pictures) install_pictures ;;
        --browser) install_browser ;;
        --tools)
            install_tools "${TOOLS[@]}"
            install_promtool
            install_kustomize
            ;;
        --servers) install_tools "${SERVERS[@]}" ;;
        --runtime) install_runtime_packages ;;
        *) fail "unknown option $1; known: --system, --pictures, --browser, --tools, --servers, --runtime" ;;
    esac
}

install_everything() {
    local began=$SECONDS
    install_system_packages
    make_venv
    install_package
    try_imports
    tell_unusable_cards
    list_runtime_packages
    fingerprint >"$STAMP"
    say "ready after $((SECONDS - began)) s"
}

is_current() {
    [[ -f $STAMP && -x $VENV/bin/python ]] || return 1
    [[ -z ${PYTHON:-} || $(python_version "$PYTHON") == "$(python_version "$VENV/bin/python")" ]] || return 1
    [[ $(<"$STAMP") == "$(fingerprint)" ]]
}

fingerprint() {
    {
        cat pyproject.toml requirements.lock infra/setup.sh
        python_version "$VENV/bin/python"
        echo "locked=${LOCKED:-0} at=$PWD"
    } | sha256sum | cut -d' ' -f1
}

# ---------------------------------------------------------------------------------------------------------------------- python

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

usable() { [[ $(python_version "$1") =~ ^3\.1[123]$ ]]; }

find_python() {
    local candidate
    if [[ -n ${PYTHON:-} ]]; then
        usable "$PYTHON" || fail "PYTHON=$PYTHON must be Python 3.11, 3.12 or 3.13; got '$(python_version "$PYTHON" || echo "nothing that runs")'"
        command -v "$PYTHON"
        return
    fi
    for candidate in $VENV/bin/python python3 python3.11 python3.12 python3.13; do
        if usable "$candidate"; then
            # A virtual environment's python stands for the one that it was made from.
            "$candidate" -c 'import os, sys; print(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))'
            return
        fi
    done
    return 1
}

has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }
has_headers() { "$1" -c 'import os, sysconfig; raise SystemExit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; }

make_venv() {
    local python
    python=$(find_python)
    if [[ $(python_version "$VENV/bin/python") != "$(python_version "$python")" || ! -x $VENV/bin/pip ]] || is_moved; then
        # `--clear` empties what a link leads to, which may be the environment of another clone.
        [[ ! -L $VENV ]] || fail "$VENV is a link to $(readlink "$VENV"), which is not this clone's and would be emptied; remove the link"
        say "virtual environment in $VENV ($("$python" --version))"
        "$python" -m venv --clear "$VENV"
        echo "$PWD" >"$VENV/home"
    fi
}

# The scripts of a virtual environment begin with its absolute path. One made by other means has no note of it, and is left alone.
is_moved() { [[ -f $VENV/home && $(<"$VENV/home") != "$PWD" ]]; }

install_package() {
    local pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
    rm -f "$STAMP"
    if [[ ${LOCKED:-0} == 1 ]]; then
        say "releases of requirements.lock (about 3 GB to fetch where torch comes with CUDA)"
        # Source archives (FFCV, DeepSpeed, ...) and this package are built by the locked setuptools, which has to be there first:
        # in an environment of its own for each build pip would take the newest, and check it against nothing.
        "${pip[@]}" --require-hashes --requirement <(sed -n '/^setuptools==/,/^    #/p' requirements.lock)
        "${pip[@]}" --require-hashes --no-build-isolation --requirement requirements.lock
        "${pip[@]}" --no-deps --no-build-isolation --editable .
    else
        say "newest releases that pyproject.toml admits (about 3 GB to fetch where torch comes with CUDA)"
        # First: pip keeps what is installed, and would take another build of it where it backtracks over the rest.
        mapfile -t torch < <(sed -n 's/^    "\(torch[^"]*\)".*/\1/p' pyproject.toml)
        "${pip[@]}" "${torch[@]}"
        "${pip[@]}" --editable '.[dev]' # which names every other extra
    fi
}

try_imports() {
    # A missing shared library is found here, by name, and not an hour into a run.
    local modules='cv2, ffcv, torch'
    if [[ $(uname -m) == x86_64 ]]; then modules+=', numba.np.ufunc.tbbpool'; fi
    "$VENV/bin/python" -W ignore -c "import $modules" ||
        fail "installed, but does not import; the last line above names what is missing"
}

# Not a failure: a machine whose cards torch cannot use still trains on its CPU. The image is built without the code, and a card.
tell_unusable_cards() {
    local found
    [[ -d pipeline ]] || return 0
    found=$("$VENV/bin/python" -c 'from pipeline.measure.memory import unusable_gpus; print(unusable_gpus() or "")')
    [[ -z $found ]] || say "$found"
}

# -------------------------------------------------------------------------------------------------------------- system packages

install_system_packages() {
    local python wanted=("${PACKAGES[@]}") version
    if python=$(find_python); then
        version=$(python_version "$python")
        has_venv "$python" || wanted+=("python$version-venv")
        has_headers "$python" || wanted+=("python$version-dev")
    elif [[ -n ${PYTHON:-} ]]; then
        exit 1 # find_python has said why
    else
        wanted+=(python3 python3-venv python3-dev)
    fi

    if ! command -v apt-get >/dev/null; then
        check_without_apt "${python:-}"
        return
    fi
    apt_install "${wanted[@]}"

    python=$(find_python) || fail "needs Python 3.11, 3.12 or 3.13; this distribution's python3 is $(python_version python3). Install one and name it: PYTHON=/path/to/python3.12 make setup"
    has_venv "$python" || fail "$python cannot make virtual environments: its modules venv and ensurepip are missing"
    has_headers "$python" || fail "$python has no C headers (Python.h), which FFCV's build needs"
}

install_pictures() {
    command -v apt-get >/dev/null || fail "this system has no apt-get; unpack Debian's packages ${PICTURES[*]}, and name their usr/share: spiketrain write stamps --source DIR"
    apt_install "${PICTURES[@]}"
}

install_browser() {
    local name
    for name in "${BROWSERS[@]}"; do
        if command -v "$name" >/dev/null; then return; fi
    done
    command -v apt-get >/dev/null || fail "this system has no apt-get; install one of ${BROWSERS[*]} by its own means"
    apt_install "${BROWSERS[0]}"
}

install_tools() {
    command -v apt-get >/dev/null || fail "this system has no apt-get; install by its own means: $*"
    apt_install "$@"
}

# A package of its own since Debian 13. Before, it is a part of prometheus, which starts a server that no test uses.
install_promtool() {
    if command -v promtool >/dev/null; then return; fi
    if apt-cache show promtool >/dev/null 2>&1; then apt_install promtool; else apt_install prometheus; fi
}

# In Debian since 13; not in Ubuntu 24.04, where the tests of infra/k8s are skipped unless kubectl is there.
install_kustomize() {
    if command -v kustomize >/dev/null; then return; fi
    if apt-cache show kustomize >/dev/null 2>&1; then
        apt_install kustomize
    else
        say "this distribution has no kustomize; tests of infra/k8s will be skipped"
    fi
}

apt_install() {
    local missing=() optional=() package
    for package in "$@"; do is_installed "$package" || missing+=("$package"); done
    for package in "${OPTIONAL[@]}"; do is_installed "$package" || optional+=("$package"); done
    if ((${#missing[@]} + ${#optional[@]} == 0)); then return; fi

    if ! can_be_root; then
        if ((${#missing[@]} == 0)); then return; fi
        fail "these system packages are missing, and this user may not install them: not root, and no sudo that lets it in.
    Have an administrator run:  apt-get install ${missing[*]}"
    fi
    say "system packages: ${missing[*]:-none missing}"
    as_root apt-get update -qq || say "apt-get update failed; going on with the package lists that are there"
    for package in "${optional[@]}"; do
        if apt-cache show "$package" >/dev/null 2>&1; then missing+=("$package"); fi
    done
    if ((${#missing[@]} == 0)); then return; fi
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null ||
        fail "apt-get could not install: ${missing[*]}"
}

is_installed() { [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null) == installed ]]; }

can_be_root() { ((EUID == 0)) || { command -v sudo >/dev/null && { [[ -t 0 ]] || sudo -n true 2>/dev/null; }; }; }
as_root() { if ((EUID == 0)); then "$@"; else sudo "$@"; fi; }

check_without_apt() {
    local python=$1 missing=()
    [[ -n $python ]] || missing+=("Python 3.11, 3.12 or 3.13")
    [[ -z $python ]] || has_venv "$python" || missing+=("the modules venv and ensurepip of $python")
    [[ -z $python ]] || has_headers "$python" || missing+=("the C headers of $python")
    command -v c++ >/dev/null || missing+=("a C++ compiler, as c++")
    if command -v pkg-config >/dev/null; then
        pkg-config --exists opencv4 || missing+=("OpenCV 4 with headers (pkg-config opencv4)")
        pkg-config --exists libturbojpeg || missing+=("libjpeg-turbo's TurboJPEG with headers (pkg-config libturbojpeg)")
    else
        missing+=("pkg-config, OpenCV 4 with headers, TurboJPEG with headers")
    fi
    if ((${#missing[@]} == 0)); then return; fi
    fail "this system has no apt-get, so please install by its own means:
$(printf '    %s\n' "${missing[@]}")
    and oneTBB (libtbb.so.12), which FFCV's loops run on"
}

# What the compiled parts link to, as packages of this distribution: read off, because their names change with every release.
list_runtime_packages() {
    local python version
    command -v dpkg-query >/dev/null || return 0
    python=$(realpath "$VENV/bin/python")
    version=$(python_version "$python")
    {
        # Triton compiles a launcher for each kernel when it first runs.
        printf '%s\n' gcc libc6-dev
        # NCCL loads them by itself; without them it takes TCP where there is InfiniBand.
        printf '%s\n' libibverbs1 ibverbs-providers
        if dpkg-query --search "$python" >/dev/null 2>&1; then printf '%s\n' "python$version" "python$version-dev"; fi
        find "$VENV"/lib/python*/site-packages \( -path '*/ffcv/_libffcv*.so' -o -path '*/cv2/cv2*.so' -o -name 'tbbpool*.so' \) -exec ldd {} + |
            awk '$2 == "=>" && $3 ~ "^/" {print $3}' | sort -u | xargs realpath | { grep -v "$PWD" || true; } |
            xargs --no-run-if-empty dpkg-query --search 2>/dev/null | cut -d: -f1
    } | sort -u >"$RUNTIME_LIST"
}

install_runtime_packages() {
    local packages
    [[ -f $RUNTIME_LIST ]] || fail "--runtime reads $RUNTIME_LIST, which a full run writes; copy a finished $VENV first"
    mapfile -t packages <"$RUNTIME_LIST"
    apt_install "${packages[@]}"
}

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

main "$@"
