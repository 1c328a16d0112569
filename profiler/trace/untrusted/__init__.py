"""Parquet files from unknown writers: footers and sizes are checked before anything is decoded."""
