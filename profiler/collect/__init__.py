"""Collecting a trace: which problems, with which engine, resumed where it was interrupted."""
