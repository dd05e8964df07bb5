"""What a server keeps on disk: folders of requests that are not jobs yet, and what becomes of old jobs."""
