package server

import (
	"cmp"
	"encoding/json"
	"fmt"
	"iter"
	"maps"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kmsctl/kmsctl/internal/pattern"
	"github.com/kmsctl/kmsctl/pkg/kmsapi"
)

// doc says of an endpoint what its route does not: the body that goes in, the
// one that comes out, and the query parameters.
type doc struct {
	in, out any
	query   string
}

// docs describes endpoints by their audit action.
var docs = map[string]doc{
	"kms.secrets.create": {kmsapi.CreateKeys{}, kmsapi.Keys{}, ""}, "kms.secrets-with-policy-overrides.create": {kmsapi.CreateKeys{}, kmsapi.Keys{}, ""},
	"kms.secrets.list": {nil, kmsapi.Keys{}, "limit offset state extractable search sort filter totalCount"},
	"kms.secrets.head": {nil, nil, "state extractable search filter"}, "kms.secrets.read": {nil, kmsapi.Keys{}, ""},
	"kms.secrets-metadata.read": {nil, kmsapi.Keys{}, ""}, "kms.secrets.patch": {kmsapi.PatchKey{}, kmsapi.Keys{}, ""},
	"kms.secrets.delete": {nil, nil, "force"}, "kms.secrets.purge": {}, "kms.secrets.restore": {nil, kmsapi.Keys{}, ""},
	"kms.secrets-key-versions.list": {nil, kmsapi.Collection[kmsapi.KeyVersion]{}, "limit offset totalCount allKeyStates"},
	"kms.secrets.wrap":              {kmsapi.WrapRequest{}, kmsapi.ActionAnswer{}, ""}, "kms.secrets.unwrap": {kmsapi.UnwrapRequest{}, kmsapi.ActionAnswer{}, ""},
	"kms.secrets.rewrap": {kmsapi.UnwrapRequest{}, kmsapi.ActionAnswer{}, ""}, "kms.secrets.rotate": {kmsapi.RotateRequest{}, nil, ""},
	"kms.secrets.disable": {}, "kms.secrets.enable": {}, "kms.secrets.setkeyfordeletion": {}, "kms.secrets.unsetkeyfordeletion": {}, "kms.secrets.sync": {},
	"kms.policies.read":        {nil, kmsapi.Collection[kmsapi.KeyPolicy]{}, "policy"},
	"kms.policies.write":       {kmsapi.Collection[kmsapi.KeyPolicy]{}, kmsapi.Collection[kmsapi.KeyPolicy]{}, "policy"},
	"kms.secrets-alias.create": {nil, kmsapi.Collection[kmsapi.Alias]{}, ""}, "kms.secrets-alias.delete": {},
	"kms.registrations.list":   {nil, kmsapi.Collection[kmsapi.Registration]{}, "limit offset urlEncodedResourceCRNQuery preventKeyDeletion totalCount"},
	"kms.registrations.create": {kmsapi.CreateRegistration{}, kmsapi.Collection[kmsapi.Registration]{}, ""}, "kms.registrations.delete": {},
	"kms.key-rings.list": {nil, kmsapi.Collection[kmsapi.KeyRing]{}, "limit offset totalCount"}, "kms.key-rings.create": {}, "kms.key-rings.delete": {nil, nil, "force"},
	"kms.import-token.create": {kmsapi.ImportTokenRequest{}, kmsapi.ImportToken{}, ""}, "kms.import-token.read": {nil, kmsapi.ImportToken{}, ""},
	"kms.instance-policies.read":        {nil, kmsapi.Collection[kmsapi.InstancePolicy]{}, "policy"},
	"kms.instance-policies.write":       {kmsapi.Collection[kmsapi.InstancePolicy]{}, nil, "policy"},
	"kms.instance-allowed-ip-port.read": {nil, kmsapi.Collection[kmsapi.AllowedPort]{}, ""},
	"kmsctl.instances.create":           {kmsapi.CreateInstance{}, kmsapi.Instance{}, ""}, "kmsctl.instances.list": {nil, kmsapi.Instances{}, ""}, "kmsctl.instances.delete": {},
	"kmsctl.onboard": {kmsapi.OnboardRequest{}, kmsapi.Onboarded{}, ""}, "kmsctl.audit.read": {nil, kmsapi.AuditHeads{}, ""}, "kmsctl.backup.read": {},
	"iam.signing-keys.list": {nil, kmsapi.SigningKeys{}, ""}, "iam.signing-keys.rotate": {kmsapi.RotateSigningKey{}, kmsapi.SigningKey{}, ""},
	"kmsctl.clear.read": {nil, kmsapi.ClearPlan{}, ""}, "kmsctl.clear.plan": {kmsapi.ClearRequest{}, kmsapi.ClearPlan{}, ""},
	"kmsctl.clear.settle": {nil, kmsapi.Cleared{}, ""}, "kmsctl.clear": {kmsapi.ClearRequest{}, kmsapi.Cleared{}, ""},
	"kmsctl.master.read": {nil, kmsapi.MasterStatus{}, ""}, "kmsctl.master.rotate": {kmsapi.MasterRotationRequest{}, kmsapi.MasterStatus{}, ""},
	"kmsctl.master.stop":     {nil, kmsapi.MasterStatus{}, ""},
	"iam.service-ids.create": {kmsapi.CreateServiceID{}, kmsapi.ServiceID{}, ""}, "iam.service-ids.list": {nil, kmsapi.ServiceIDs{}, ""}, "iam.service-ids.delete": {},
	"iam.api-keys.create": {kmsapi.CreateAPIKey{}, kmsapi.APIKey{}, ""}, "iam.api-keys.list": {nil, kmsapi.APIKeys{}, "serviceId"}, "iam.api-keys.delete": {},
	"iam.policies.create": {kmsapi.CreatePolicy{}, kmsapi.PolicyID{}, ""}, "iam.policies.list": {nil, kmsapi.Policies{}, ""}, "iam.policies.delete": {},
}

type object = map[string]any

// openAPI is the API's description, OpenAPI 3.1, made of the routes
// themselves, so that it cannot fall behind them.
func openAPI() object {
	s := schemas{}
	paths := object{}
	for _, r := range routes() {
		for _, p := range r.paths {
			for m := range strings.FieldsSeq(r.methods) {
				addTo(paths, strings.TrimSuffix(p, "{$}"), m, operation(s, r, p))
			}
		}
	}
	for _, p := range []string{"/identity/token", "/oidc/token", "/iam-token/oidc/token"} {
		addTo(paths, p, "POST", object{"summary": "Exchange an API key for an access token", "security": []any{}, "requestBody": object{"content": object{
			"application/x-www-form-urlencoded": object{"schema": object{"type": "object", "required": []string{"grant_type", "apikey"}, "properties": object{
				"grant_type": object{"const": grantType}, "apikey": object{"type": "string"}}}}}},
			"responses": object{"200": answer("the token", s.of(kmsapi.Token{})), "400": answer("refused", s.of(kmsapi.TokenError{}))}})
	}
	for p, what := range map[string]string{"/livez": "the process lives", "/readyz": "the service can be used; 503 with reasons when not", "/metrics": "Prometheus metrics", "/openapi.json": "this document"} {
		addTo(paths, p, "GET", object{"summary": what, "security": []any{}, "responses": object{"200": object{"description": what}}})
	}
	s.of(kmsapi.Errors{})
	return object{
		"openapi": "3.1.0",
		"info":    object{"title": "kmsctl", "version": "2", "description": "IBM Key Protect v2 with ICP's dialect, and kmsctl's own calls."},
		"paths":   paths, "security": []any{object{"bearer": []string{}}},
		"components": object{"schemas": s, "securitySchemes": object{"bearer": object{"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}}},
	}
}

func addTo(paths object, path, method string, op object) {
	item, ok := paths[path].(object)
	if !ok {
		item = object{}
		paths[path] = item
	}
	item[strings.ToLower(method)] = op
}

var pathParameter = pattern.Lazy(`\{([a-z]+)\}`)

func operation(s schemas, r route, path string) object {
	d := docs[r.name]
	var params []any
	param := func(in, name string, required bool) {
		typ := "string"
		if in == "query" && (name == "limit" || name == "offset") {
			typ = "integer"
		}
		params = append(params, object{"in": in, "name": name, "required": required, "schema": object{"type": typ}})
	}
	for _, m := range pathParameter().FindAllStringSubmatch(path, -1) {
		param("path", m[1], true)
	}
	if r.scope.inside() || r.scope == managing {
		param("header", kmsapi.HeaderInstance, false)
		param("header", kmsapi.HeaderInstanceICP, false)
	}
	if r.scope == onKey || r.scope == inRing {
		param("header", kmsapi.HeaderKeyRing, false)
	}
	param("header", kmsapi.HeaderCorrelation, false)
	for name := range strings.FieldsSeq(d.query) {
		param("query", name, false)
	}
	refusal := s.of(kmsapi.Errors{})
	op := object{"summary": about[r.name], "x-audit-action": r.name, "x-action": string(r.action), "parameters": params, "responses": object{
		fmt.Sprint(r.status): answer("done", s.of(d.out)),
		"401":                answer("no valid token", refusal), "403": answer("the policies do not allow it", refusal),
		"429": later("more calls a second than one identity may make", refusal), "503": later("the HSM, the storage or the audit log is away, or the load is too high", refusal),
		"default": answer("refused: see the reason's code", refusal)}}
	if d.in != nil {
		op["requestBody"] = object{"content": object{"application/json": object{"schema": s.of(d.in)}}}
	}
	return op
}

func answer(what string, schema any) object {
	if schema == nil {
		return object{"description": what}
	}
	return object{"description": what, "content": object{"application/json": object{"schema": schema}}}
}

// later is a refusal that says when to come again.
func later(what string, schema any) object {
	a := answer(what, schema)
	a["headers"] = object{"Retry-After": object{"description": "seconds to wait", "schema": object{"type": "integer"}}}
	return a
}

// schemas are the JSON schemas of the wire types, by name.
type schemas map[string]any

func (s schemas) of(v any) any {
	if v == nil {
		return nil
	}
	return s.typ(reflect.TypeOf(v))
}

func (s schemas) typ(t reflect.Type) any {
	switch t.Kind() {
	case reflect.Pointer:
		return s.typ(t.Elem())
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.String:
		return object{"type": "string"}
	case reflect.Slice:
		if t.Elem().Kind() == reflect.Uint8 {
			return object{"type": "string", "contentEncoding": "base64"}
		}
		return object{"type": "array", "items": s.typ(t.Elem())}
	case reflect.Struct:
		if t == reflect.TypeFor[time.Time]() {
			return object{"type": "string", "format": "date-time"}
		}
		return s.structure(t)
	}
	return object{"type": "integer"} // no other kind is on the wire
}

var notInNames = pattern.Lazy(`[^A-Za-z0-9]+(kmsapi\.)?`)

func (s schemas) structure(t reflect.Type) any {
	name := strings.Trim(notInNames().ReplaceAllString(strings.ReplaceAll(t.Name(), "github.com/kmsctl/kmsctl/pkg/kmsapi.", ""), "_"), "_")
	ref := object{"$ref": "#/components/schemas/" + name}
	if _, done := s[name]; done {
		return ref
	}
	props := object{}
	s[name] = object{"type": "object", "properties": props}
	for f := range t.Fields() {
		key, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if key = cmp.Or(key, f.Name); f.IsExported() && key != "-" {
			props[key] = s.typ(f.Type)
		}
	}
	return ref
}

// serveOpenAPI answers with the document, which the first call makes.
func serveOpenAPI() http.HandlerFunc {
	document := sync.OnceValue(func() []byte {
		b, err := json.Marshal(openAPI())
		if err != nil {
			panic(err) // maps and strings always marshal
		}
		return b
	})
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(document()) // a caller who is gone cannot be told
	}
}

// undocumented are the routes that docs or about know nothing of, and their
// entries without a route.
func undocumented() []string {
	var out []string
	seen := map[string]bool{}
	for _, r := range routes() {
		seen[r.name] = true
		if _, ok := docs[r.name]; !ok || about[r.name] == "" {
			out = append(out, r.name)
		}
	}
	for _, names := range []iter.Seq[string]{maps.Keys(docs), maps.Keys(about)} {
		for name := range names {
			if !seen[name] {
				out = append(out, name)
			}
		}
	}
	return slices.Compact(slices.Sorted(slices.Values(out)))
}
