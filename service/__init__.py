"""FSA Serve: sparse attention as a service."""
