"""Beyond the paper's protocol: models that are not fine-tuned, one photograph explained, and a check of images."""
