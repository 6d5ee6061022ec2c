"""Above results: a job's summary as one HTML file that opens from disk, without network and without scripts."""
