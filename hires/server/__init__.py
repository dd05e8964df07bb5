"""The HTTP front: `hires serve`. A1111's and OpenAI's endpoints, jobs that survive a restart, a web page. Extra `server`."""
