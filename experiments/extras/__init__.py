"""Beyond the paper: settings for models that are not fine-tuned."""
