#!/usr/bin/env bash
# The whole pipeline on the data in the box: pictures in, new pictures out. Run again to resume.
set -euo pipefail
data="$(dirname "$0")/data"
out="${1:-runs/demo}"

ae=$(ldmkit train-ae "$data" --preset tiny --out "$out/ae")
latents=$(ldmkit encode "$data" --ae "$ae" --out "$out/latents")
ldm=$(ldmkit train-diffusion "$latents" --preset tiny --ae "$ae" --out "$out/ldm")
ldmkit sample "$ldm" --num 32 --guidance 3 --label Flags --label "Smileys & Emotion" --label Symbols \
  --label "People & Body" | ldmkit decode --ae "$ae" --out "$out/samples" > /dev/null
python "$(dirname "$0")/contact_sheet.py" "$data" "$ae" "$out/samples" "$out/demo.png"
