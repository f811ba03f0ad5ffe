#!/usr/bin/env bash
# versions.sh VENV "VERSION ..." TEST...: the tests with other versions of transformers than VENV's, one after the other.
# An overlay on the path, not an environment: transformers alone differs, and it says itself if it wants other packages.
set -euo pipefail
python="$1/bin/python" versions=$2
shift 2

installed=$("$python" -c 'import transformers; print(transformers.__version__)')
for version in $versions; do
  if "$python" -c 'import sys; from packaging.version import Version as V; sys.exit(V(sys.argv[1]) != V(sys.argv[2]))' \
    "$version" "$installed"; then
    continue # `make test` tests it
  fi
  overlay=$(mktemp -d)
  trap 'rm -rf "$overlay"' EXIT
  echo "== transformers $version (make test: $installed)"
  # shellcheck disable=SC2086  # several arguments, and none where there are none
  "$python" -m pip install --quiet --disable-pip-version-check ${PIP_ARGS:-} --no-deps --no-compile --target "$overlay" \
    "transformers==$version"
  export PYTHONPATH="$overlay"
  found=$("$python" -c 'import transformers; print(transformers.__file__)')
  case $found in "$overlay"/*) ;; *) echo "transformers came from $found" >&2; exit 1 ;; esac
  # shellcheck disable=SC2086
  "$python" -m pytest -m "not browser and not gpu" -p no:cacheprovider ${PYTEST_ARGS:-} "$@"
  unset PYTHONPATH
  rm -rf "$overlay"
done
