"""Model files of other projects, in and out: names, shapes, configs, and proof by running both."""
