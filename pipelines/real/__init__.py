"""Every stage on real pretrained parts and human speech, offline: from wheels to word error rates."""
