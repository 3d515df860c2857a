#!/usr/bin/env bash
# The class of each pixel to pictures: semantic synthesis.
# semantic_synthesis.sh [OUT]; AE=FILE takes an autoencoder that is there, STEPS=N trains the model so long. Run again to resume.
set -euo pipefail
here="$(dirname "$0")" out="${1:-runs/semantic-synthesis}"
python "$here/compose.py" "$here/data" "$out/data" --count 5000 > /dev/null
ae="${AE:-$(ldmkit train-ae "$out/data/images" --preset tiny --out "$out/ae")}"
latents=$(ldmkit encode "$out/data/images" --labelmaps "$out/data/labelmaps" --ae "$ae" --out "$out/latents")
ldm=$(ldmkit train-diffusion "$latents" --preset tiny --holdout 0.05 ${STEPS:+--steps "$STEPS"} --ae "$ae" --out "$out/ldm" \
  --condition labelmap --labelmap.classes 10 --labelmap.mapped 10)
ldmkit sample "$ldm" --like "$latents" --holdout 0.05 --num 12 --guidance-of labelmap=1.5 | ldmkit decode --ae "$ae" --out "$out/samples" > /dev/null
python "$here/beside.py" "$latents" "$ae" "$out/sheet.png" "$out/samples" --told labelmap
