#!/usr/bin/env bash
# Prints the path of the first of the given versions of Python that runs here.
#
#   tools/find_python.sh 3.13 3.12
#
# A name on PATH may be a shim that refuses to run, so every candidate is tried.
set -u

candidates() { # VERSION
  command -v "python$1"
  command -v python3
  ls -d "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python /usr/bin/python"$1" \
    /usr/local/bin/python"$1" /opt/python/*/bin/python"$1" 2>/dev/null
  command -v uv >/dev/null && uv python find --no-project "$1" 2>/dev/null
}

can_make_venvs() { # PYTHON VERSION
  "$1" -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$2')" \
    </dev/null >/dev/null 2>&1
}

for version in "$@"; do
  while read -r python; do
    if can_make_venvs "$python" "$version"; then
      echo "$python"
      exit 0
    fi
  done < <(candidates "$version")
done
echo "no Python $* that runs and has the modules venv and ensurepip: tried python3 and" \
  "python$1 on PATH, pyenv, uv, /usr/bin, /usr/local/bin and /opt/python." \
  "Install one, for example with your system's packages, pyenv or uv." >&2
exit 1
