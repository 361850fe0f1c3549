"""The uses of the training loop, a folder each: classifier, adamatch, siamese, demo."""
