#!/usr/bin/env bash
# Pictures with a hole to whole ones.
# inpainting.sh [OUT]; AE=FILE takes an autoencoder that is there, STEPS=N trains the model so long. Run again to resume.
set -euo pipefail
here="$(dirname "$0")" out="${1:-runs/inpainting}"
ae="${AE:-$(ldmkit train-ae "$here/data" --preset tiny --out "$out/ae")}"
latents=$(ldmkit encode "$here/data" --ae "$ae" --holes mixed --keep-pictures --out "$out/latents")
ldm=$(ldmkit train-diffusion "$latents" --preset tiny --holdout 0.05 ${STEPS:+--steps "$STEPS"} --ae "$ae" --out "$out/ldm" \
  --condition mask)
ldmkit sample "$ldm" --like "$latents" --holdout 0.05 --num 12 --guidance 1 | ldmkit decode --ae "$ae" --out "$out/samples" > /dev/null
python "$here/beside.py" "$latents" "$ae" "$out/sheet.png" "$out/samples" --told mask
