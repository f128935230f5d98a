def pytest_addoption(parser):
    parser.addoption("--shots", help="folder for the browser tests' screenshots")
