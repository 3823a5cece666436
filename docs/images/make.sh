#!/usr/bin/env bash
# The pictures of README and docs, made again from a quickstart run: docs/images/make.sh (needs clado and Chromium).
set -euo pipefail
cd "$(dirname "$0")"
run=${1:-$(mktemp -d)/run}
[ -e "$run/report.html" ] || clado quickstart --output-dir "$run"
clado report "$run" --format svg --out "$run/figures"
cp "$run/figures/interactions.svg" .
for scheme in light dark; do
  profile=$(mktemp -d)
  chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
    --disable-component-update --disable-sync --user-data-dir="$profile" --hide-scrollbars --virtual-time-budget=20000 \
    --blink-settings=preferredColorScheme=$([ $scheme = light ] && echo 1 || echo 0) --window-size=1180,1420 \
    --screenshot="$PWD/report-$scheme.png" "file://$(realpath "$run")/report.html"
  rm -rf "$profile"
done
