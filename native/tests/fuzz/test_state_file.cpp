// The state file where it is no file: opening a pipe would wait for a writer, renaming over it would remove it.
#include "check.h"
#include "hybrid/state_file.h"
#include "toy_book.h"

#include <cstdio>
#include <string>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

namespace {

bool is_pipe(const std::string & path) {
    struct stat status{};
    return ::lstat(path.c_str(), &status) == 0 && S_ISFIFO(status.st_mode);
}

void test_pipe() {
    const toy_book book;
    const std::string path = "state_file_test_pipe." + std::to_string(::getpid());
    CHECK(::mkfifo(path.c_str(), 0600) == 0);
    std::vector<std::vector<int32_t>> experts = {{1}, {2}};
    std::string problem;
    CHECK(!hybrimoe::read_state(path, book.get(), experts, problem));
    CHECK(experts.empty() && problem == path + " is no regular file");
    CHECK(!hybrimoe::write_state(path, book.get(), {{0}, {1}}));
    CHECK(is_pipe(path));
    std::remove(path.c_str());
}

void test_device() {
    const toy_book book;
    std::vector<std::vector<int32_t>> experts;
    std::string problem;
    CHECK(!hybrimoe::read_state("/dev/zero", book.get(), experts, problem) && !problem.empty());
}

void test_file() {
    const toy_book book;
    const std::string path                       = "state_file_test." + std::to_string(::getpid());
    const std::vector<std::vector<int32_t>> kept = {{0, 3, 7}, {15, 1}};
    std::vector<std::vector<int32_t>> experts;
    std::string problem;
    CHECK(hybrimoe::read_state(path, book.get(), experts, problem) && experts.empty()); // none yet
    CHECK(hybrimoe::write_state(path, book.get(), kept));
    CHECK(hybrimoe::read_state(path, book.get(), experts, problem) && experts == kept);
    std::remove(path.c_str());
}

} // namespace

int main() {
    test_pipe();
    test_device();
    test_file();
    return check::report();
}
