"""What the tests share: traces, frames, stand-ins for services, and programs that tests run."""
