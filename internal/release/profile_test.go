package release_test

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"

	"github.com/kmsctl/kmsctl/internal/release"
)

// clientFiles renders a model, and gives the files of the vendor's client and
// the pod that mounts them.
func clientFiles(t *testing.T, v values) (map[string]string, corev1.PodSpec) {
	t.Helper()
	manifest, err := release.Template(embedded(t), "kms", "kube-system", v, "1.37.2")
	if err != nil {
		t.Fatal(err)
	}
	objs := objects(t, manifest)
	for _, o := range objs {
		if c, ok := o.(*corev1.ConfigMap); ok && c.Name == "kms-hsm-config" {
			return c.Data, podSpecs(objs)["kms-oss"]
		}
	}
	t.Fatal("no ConfigMap kms-hsm-config")
	return nil, corev1.PodSpec{}
}

// mountedAt says whether a container of the pod sees the path.
func mountedAt(pod corev1.PodSpec, path string) bool {
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		for _, m := range c.VolumeMounts {
			if path == m.MountPath || strings.HasPrefix(path, strings.TrimSuffix(m.MountPath, "/")+"/") {
				return true
			}
		}
	}
	return false
}

// chrystoki reads a file in the form that the Luna client documents: sections
// in braces, one entry a line, each with a semicolon, no TAB.
func chrystoki(t *testing.T, text string) map[string]map[string]string {
	t.Helper()
	head, entry := regexp.MustCompile(`^(\w[\w ]*) = \{$`), regexp.MustCompile(`^  (\w+) = (\S+);$`)
	out, section := map[string]map[string]string{}, ""
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		h, e := head.FindStringSubmatch(line), entry.FindStringSubmatch(line)
		switch {
		case h != nil && section == "" && out[h[1]] == nil:
			section = h[1]
			out[section] = map[string]string{}
		case e != nil && section != "" && out[section][e[1]] == "":
			out[section][e[1]] = e[2]
		case line == "}" && section != "":
			section = ""
		default:
			t.Fatalf("%q in section %q", line, section)
		}
	}
	if section != "" {
		t.Fatalf("section %q has no end", section)
	}
	return out
}

// TestChrystokiConf: the Luna client's file is in its documented form, names
// the appliance once, and points at files that the pod has.
func TestChrystokiConf(t *testing.T) {
	files, pod := clientFiles(t, modelValues("gemalto", nil))
	got := chrystoki(t, files["Chrystoki.conf"])
	client := got["LunaSA Client"]
	for _, path := range []string{client["ClientPrivKeyFile"], client["ClientCertFile"], client["ServerCAFile"], client["HtlDir"] + "x"} {
		if !strings.HasPrefix(path, "/") || !mountedAt(pod, path) {
			t.Errorf("%q is mounted nowhere", path)
		}
	}
	var lib string
	for _, c := range pod.Containers {
		for _, a := range c.Args {
			if m, ok := strings.CutPrefix(a, "--module="); ok {
				lib = m
			}
		}
	}
	if lib != got["Chrystoki2"]["LibUNIX64"] {
		t.Errorf("the connector loads %q, the file says %q", lib, got["Chrystoki2"]["LibUNIX64"])
	}
	for _, path := range []string{"ClientPrivKeyFile", "ClientCertFile", "ServerCAFile", "HtlDir", "SSLConfigFile"} {
		delete(client, path)
	}
	if d := cmp.Diff(map[string]string{"ReceiveTimeout": "20000", "NetClient": "1", "TCPKeepAlive": "1",
		"ServerName00": "10.0.0.1", "ServerPort00": "1792", "ServerHtl00": "0"}, client); d != "" {
		t.Error(d)
	}
	for _, s := range []string{"Chrystoki2", "Luna", "CardReader", "Misc"} {
		if len(got[s]) == 0 {
			t.Errorf("no section %q", s)
		}
	}
}

// TestCknfastrc: what nShield's library reads switches off no more of its
// assurances than the connector needs, and traces nothing.
func TestCknfastrc(t *testing.T) {
	files, pod := clientFiles(t, modelValues("thales", nil))
	got := map[string]string{}
	for line := range strings.Lines(files["cknfastrc"]) {
		name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		if !ok || value == "" || got[name] != "" {
			t.Fatalf("%q", line)
		}
		got[name] = value
	}
	if d := cmp.Diff(map[string]string{"CKNFAST_LOADSHARING": "1", "CKNFAST_FAKE_ACCELERATOR_LOGIN": "1", "CKNFAST_ASSUME_SINGLE_PROCESS": "0",
		"CKNFAST_OVERRIDE_SECURITY_ASSURANCES": "unwrap_mech;tokenkeys"}, got); d != "" {
		t.Error(d)
	}
	if !mountedAt(pod, "/opt/nfast/cknfastrc") {
		t.Error("cknfastrc is mounted nowhere")
	}
}

// TestHardserverConfig: the hardserver refuses a field without a value, and
// looks up the Connect and the RFS.
func TestHardserverConfig(t *testing.T) {
	v := modelValues("thales", nil)
	v["hsm"].(values)["esn"], v["hsm"].(values)["keyhash"] = "1111-2222-3333", strings.Repeat("ab", 20)
	for name, c := range map[string]struct {
		v       values
		imports map[string]string
	}{
		"proven": {v, map[string]string{"local_module": "1", "remote_ip": "10.0.0.1", "remote_port": "9004", "privileged": "0",
			"remote_esn": "1111-2222-3333", "keyhash": strings.Repeat("ab", 20)}},
		"trusted on first use": {modelValues("thales", nil), map[string]string{"local_module": "1", "remote_ip": "10.0.0.1", "remote_port": "9004", "privileged": "0"}},
	} {
		t.Run(name, func(t *testing.T) {
			files, _ := clientFiles(t, c.v)
			first, rest, _ := strings.Cut(files["config"], "\n")
			if first != "syntax-version=1" {
				t.Errorf("it begins with %q", first)
			}
			got, section := map[string]map[string]string{}, ""
			for line := range strings.Lines(rest) {
				line = strings.TrimSuffix(line, "\n")
				name, value, ok := strings.Cut(line, "=")
				switch {
				case line == "":
				case strings.HasPrefix(line, "[") && strings.HasSuffix(line, "]"):
					section = strings.Trim(line, "[]")
					got[section] = map[string]string{}
				case ok && value != "" && section != "":
					got[section][name] = value
				default:
					t.Fatalf("%q in section %q", line, section)
				}
			}
			if d := cmp.Diff(c.imports, got["nethsm_imports"]); d != "" {
				t.Error(d)
			}
			if got["server_startup"]["unix_socket_name"] == "" || got["rfs_sync_client"]["remote_ip"] == "" {
				t.Errorf("%v", got)
			}
		})
	}
}
