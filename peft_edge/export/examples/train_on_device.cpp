// Train an exported adapter on a folder of images with ONNX Runtime's C API, without Python.
//
//     c++ -std=c++17 -O2 train_on_device.cpp -I INCLUDE -L LIB -lonnxruntime -o train_on_device
//     ./train_on_device EXPORTED IMAGES STATE [STEPS] [LEARNING_RATE] [SEED]
//
// EXPORTED is the folder that `export_train_step` wrote. IMAGES has one subfolder for each class, with RGB images of
// the size that the network expects, as binary PPM files. ImageMagick writes such files:
// `mogrify -format ppm -resize 96x96^ -gravity center -extent 96x96 *.jpg`. STATE is the safetensors file for the
// trained adapter and the optimizer state. If STATE exists, training continues from it. Requires POSIX, little-endian.
#include <fcntl.h>
#include <onnxruntime_c_api.h>
#include <unistd.h>
#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <vector>

namespace fs = std::filesystem;
using std::string;
const OrtApi *ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
const auto FLOAT = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;

void require(bool condition, const string &message) {
  if (!condition) fprintf(stderr, "%s\n", message.c_str()), exit(1);
}
void check(OrtStatus *status) { require(!status, status ? ort->GetErrorMessage(status) : ""); }

string read_file(const fs::path &path) {
  std::ifstream file(path);
  require(file.good(), path.string() + ": cannot be opened");
  return {std::istreambuf_iterator<char>(file), {}};
}

// Return the part of a JSON text that follows the first `"key":` after the position `start`.
const char *find(const string &json, const string &key, size_t start = 0) {
  size_t found = json.find("\"" + key + "\":", start);
  require(found != string::npos, key + " is missing: this program needs a folder of export_train_step, and its state");
  return json.c_str() + found + key.size() + 3;
}

template <typename T> std::vector<T> numbers(const char *list) {
  std::vector<T> values;
  for (list = strchr(list, '[') + 1; *(list += strspn(list, ", \n")) != ']';) {
    values.push_back(T(strtod(list, const_cast<char **>(&list))));
    require(*list && values.size() < 9, "expected a short list of numbers in step.json and in the header of the state");
  }
  return values;
}

void read_image(const fs::path &path, const std::vector<int64_t> &shape, const std::vector<float> &mean,
                const std::vector<float> &deviation, float *out) {
  string file = read_file(path);
  int width = 0, height = 0, start = 0;
  size_t area = size_t(shape[2] * shape[3]);
  sscanf(file.c_str(), "P6 %d %d 255%n", &width, &height, &start);
  require(start && width == shape[3] && height == shape[2] && file.size() == start + 1 + 3 * area,
          path.string() + ": expected a binary PPM image with the height and width of the network's images");
  for (size_t i = 0; i < 3 * area; i++)  // the file has the order (H, W, C), the network (C, H, W)
    out[i % 3 * area + i / 3] = (float((unsigned char)file[start + 1 + i]) / 255 - mean[i % 3]) / deviation[i % 3];
}

// Write and fsync a temporary file, and rename it. An interruption therefore leaves either the old or the new file.
void save(const string &path, const string &contents) {
  string unfinished = path + ".unfinished";
  int file = open(unfinished.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
  bool written = file >= 0 && write(file, contents.data(), contents.size()) == ssize_t(contents.size()) && !fsync(file);
  require(written && !close(file) && !rename(unfinished.c_str(), path.c_str()), path + ": cannot be written");
}
int main(int argc, char **argv) {
  require(argc > 3, "usage: train_on_device EXPORTED IMAGES STATE [STEPS] [LEARNING_RATE] [SEED]");
  require(ort, "the library of ONNX Runtime is older than onnxruntime_c_api.h");
  const fs::path exported = argv[1], folder = argv[2];
  const int steps = argc > 4 ? atoi(argv[4]) : 50;
  float rate = argc > 5 ? strtof(argv[5], nullptr) : 0.01f;
  std::mt19937 random(argc > 6 ? atoi(argv[6]) : 0);
  string json = read_file(exported / "step.json");
  auto mean = numbers<float>(find(json, "mean")), deviation = numbers<float>(find(json, "std"));
  auto shape = numbers<int64_t>(find(json, "images"));
  require(shape.size() == 4 && mean.size() == 3 && deviation.size() == 3, "expected a network for RGB images");
  std::vector<std::pair<fs::path, int64_t>> images;
  const char *name = find(json, "class_names"), *end;
  for (int64_t label = 0; (name = strpbrk(name, "\"]")) && *name == '"'; label++, name = end + 1) {
    end = strchr(++name, '"');
    fs::path images_of_class = folder / string(name, end);
    require(fs::is_directory(images_of_class), images_of_class.string() + ": expected a folder with PPM images");
    for (const auto &entry : fs::directory_iterator(images_of_class))
      if (entry.path().extension() == ".ppm") images.emplace_back(entry.path(), label);
  }
  require(!images.empty(), folder.string() + ": expected PPM images in the subfolders");
  std::sort(images.begin(), images.end());

  // A safetensors file contains the length of the header (8 bytes), the header (JSON), and the data of the tensors.
  string state = read_file(fs::exists(argv[3]) ? fs::path(argv[3]) : exported / "state.safetensors");
  uint64_t length = 0;
  if (state.size() > 8) memcpy(&length, state.data(), 8);
  require(state.size() > 8 && length <= state.size() - 8, string(argv[3]) + " is damaged");
  string header = state.substr(8, length);
  char *data = state.data() + 8 + length;
  OrtEnv *env; OrtSessionOptions *options; OrtSession *session; OrtAllocator *allocator; OrtMemoryInfo *memory;
  size_t inputs, area = size_t(shape[1] * shape[2] * shape[3]), batch = size_t(shape[0]);
  check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "train", &env)), check(ort->CreateSessionOptions(&options));
  check(ort->DisableMemPattern(options));  // memory patterns would nearly double the memory
  check(ort->CreateSession(env, (exported / "train_step.onnx").c_str(), options, &session));
  check(ort->GetAllocatorWithDefaultOptions(&allocator));
  check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  check(ort->SessionGetInputCount(session, &inputs));
  std::vector<float> pixels(batch * area), mask(batch);
  std::vector<int64_t> labels(batch);
  std::vector<const char *> names(inputs), results{"loss", "correct"};
  std::vector<OrtValue *> values(inputs);
  std::vector<std::pair<char *, size_t>> places(2);  // target and size of each result to copy; the first two are unused
  for (size_t i = 0; i < inputs; i++) {  // for each input, make a tensor in the memory of the variables above
    auto tensor = [&](void *start, size_t bytes, std::vector<int64_t> dims, auto type) {
      check(ort->CreateTensorWithDataAsOrtValue(memory, start, bytes, dims.data(), dims.size(), type, &values[i]));
    };
    check(ort->SessionGetInputName(session, i, allocator, const_cast<char **>(&names[i])));
    const string input = names[i];
    if (input == "images") tensor(pixels.data(), 4 * pixels.size(), shape, FLOAT);
    else if (input == "labels") tensor(labels.data(), 8 * batch, {shape[0]}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
    else if (input == "mask") tensor(mask.data(), 4 * batch, {shape[0]}, FLOAT);
    else if (input == "learning_rate") tensor(&rate, 4, {}, FLOAT);
    else {  // a tensor of the adapter or of the optimizer, which the output "new:<name>" replaces
      size_t entry = size_t(find(header, input) - header.c_str());
      auto span = numbers<size_t>(find(header, "data_offsets", entry));
      require(span.size() == 2 && span[0] <= span[1] && span[1] <= state.size() - 8 - length, input + " is damaged");
      tensor(data + span[0], span[1] - span[0], numbers<int64_t>(find(header, "shape", entry)), FLOAT);
      places.emplace_back(data + span[0], span[1] - span[0]);
      results.push_back(strdup(("new:" + input).c_str()));
    }
  }
  for (int step = 1; step <= steps; step++) {
    std::shuffle(images.begin(), images.end(), random);
    for (size_t row = 0; row < std::min(batch, images.size()); row++) {  // the mask of missing images remains 0
      read_image(images[row].first, shape, mean, deviation, &pixels[row * area]);
      labels[row] = images[row].second, mask[row] = 1;
    }
    std::vector<OrtValue *> found(results.size());
    check(ort->Run(session, nullptr, names.data(), values.data(), inputs, results.data(), found.size(), found.data()));
    for (size_t i = 0; i < found.size(); i++) {
      float *result;
      check(ort->GetTensorMutableData(found[i], (void **)&result));
      if (i < 2) printf(i ? ", %.0f correct\n" : "loss %.4f", *result), fflush(stdout);
      else memcpy(places[i].first, result, places[i].second);
      ort->ReleaseValue(found[i]);
    }
  }
  save(argv[3], state);
}
