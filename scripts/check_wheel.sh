#!/usr/bin/env bash
# Builds the wheel, installs it in a fresh environment and uses it from an empty folder, with an empty home folder:
# every asset must be inside, the commands must work, and nothing may be written but runs/ and the cache folder.
# Usage: scripts/check_wheel.sh [PYTHON]. Needs the package index; about 3 GB under $TMPDIR, removed at the end.
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
python=${1:-python3}
work=$(mktemp -d)
export LC_ALL=C
trap 'rm -rf "$work"' EXIT

echo "== build"
"$python" -m venv "$work/build"
"$work/build/bin/pip" install --quiet build
mkdir "$work/source"
git -C "$source" archive HEAD | tar -x -C "$work/source"
"$work/build/bin/python" -m build --outdir "$work/dist" "$work/source" > "$work/log" || { cat "$work/log"; exit 1; }
wheel=$(echo "$work"/dist/*.whl)
(cd "$work/source" && find cfrl -type f | sort) > "$work/wanted"
"$python" -m zipfile --list "$wheel" | awk '/^cfrl\// {print $1}' | sort > "$work/inside"
diff "$work/wanted" "$work/inside"
echo "$(basename "$wheel"): $(du -h "$wheel" | cut -f1), $(wc -l < "$work/inside") files, none missing"

echo "== install"
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "$wheel"

echo "== use"
mkdir "$work/home" "$work/here"
export HOME=$work/home PATH=$work/venv/bin:$PATH
unset XDG_CACHE_HOME XDG_CONFIG_HOME CFRL_CACHE PYTHONPATH
cd "$work/here"
cfrl doctor
cfrl finetune --reward dielectric_bandgap --steps 2 -n 16 --evaluate 16
cfrl sample -n 20 --model last
cfrl retrieve --samples 20 --reward-crystals 20

echo "== what was written"
cache=$(python -c 'from cfrl.files import cache_folder; print(cache_folder())')
find "$work/here" "$work/home" -type f | sed "s|$work/||" | sort
stray=$(find "$work/here" "$work/home" -type f -not -path "$work/here/runs/*" -not -path "$cache/*")
[[ -z $stray ]] || { echo "written outside runs/ and the cache folder: $stray"; exit 1; }

echo "== a damaged asset is noticed"
model=$(python -c 'from cfrl.model.files import DEFAULT, EMBEDDED; print(EMBEDDED[DEFAULT])')
printf x | dd of="$model" bs=1 seek=2000000 conv=notrunc status=none
if cfrl doctor > /dev/null; then exit 1; fi
echo "The wheel works."
