#!/usr/bin/env bash
# Pictures with a canvas of some lightness and so many objects: numbers as conditions.
# scalar_conditional.sh [OUT]; AE=FILE takes an autoencoder that is there, STEPS=N trains the model so long. Run again to resume.
set -euo pipefail
here="$(dirname "$0")" out="${1:-runs/scalar-conditional}"
python "$here/compose.py" "$here/data" "$out/data" --count 5000 > /dev/null
ae="${AE:-$(ldmkit train-ae "$out/data/images" --preset tiny --out "$out/ae")}"
latents=$(ldmkit encode "$out/data/images" --scalars lightness,count --ae "$ae" --out "$out/latents")
ldm=$(ldmkit train-diffusion "$latents" --preset tiny --holdout 0.05 ${STEPS:+--steps "$STEPS"} --ae "$ae" --out "$out/ldm" \
  --condition scalars)
ldmkit sample "$ldm" --like "$latents" --holdout 0.05 --num 12 --guidance 2 | ldmkit decode --ae "$ae" --out "$out/samples" > /dev/null
python "$here/beside.py" "$latents" "$ae" "$out/sheet.png" "$out/samples" --told scalars
