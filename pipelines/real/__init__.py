"""The whole pipeline on real pretrained parts and human speech, offline: convert, check, extract, train, evaluate, report."""
