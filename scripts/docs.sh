#!/usr/bin/env bash
# Builds the pages of docs/ into build/docs, and fails where a link leads nowhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh --dev
.venv/bin/python -m sphinx --quiet --fail-on-warning --keep-going --builder html docs build/docs
echo "docs: build/docs/index.html"
