#!/usr/bin/env bash
# New pictures, told nothing.
# unconditional.sh [OUT]; AE=FILE takes an autoencoder that is there, STEPS=N trains the model so long. Run again to resume.
set -euo pipefail
here="$(dirname "$0")" out="${1:-runs/unconditional}"
ae="${AE:-$(ldmkit train-ae "$here/data" --preset tiny --out "$out/ae")}"
latents=$(ldmkit encode "$here/data" --ae "$ae" --out "$out/latents")
ldm=$(ldmkit train-diffusion "$latents" --preset tiny --holdout 0.05 ${STEPS:+--steps "$STEPS"} --ae "$ae" --out "$out/ldm" \
  --condition none)
ldmkit sample "$ldm" --num 12 --guidance 1 | ldmkit decode --ae "$ae" --out "$out/samples" > /dev/null
python "$here/beside.py" "$latents" "$ae" "$out/sheet.png" "$out/samples"
