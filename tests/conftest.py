"""Ctrl-C as a person has it: a shell that starts the tests in the background leaves SIGINT ignored, and what is tested about it would not happen."""
import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)
