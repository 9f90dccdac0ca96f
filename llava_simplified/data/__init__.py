"""From URLs and caption files to examples that a model can be trained on."""
