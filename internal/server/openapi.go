package server

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"path"
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
	"kmsctl.master.migrate": {kmsapi.MigrationRequest{}, kmsapi.MasterStatus{}, ""},
	"kmsctl.master.stop":    {nil, kmsapi.MasterStatus{}, ""},
	"kmsctl.clock.read":     {nil, kmsapi.ClockStatus{}, ""}, "kmsctl.clock.confirm": {kmsapi.ConfirmClock{}, kmsapi.ClockStatus{}, ""},
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
	for _, r := range slices.Concat(keyRoutes(), instanceRoutes(), ownRoutes()) {
		describe(paths, s, r, docs[r.name])
	}
	for _, r := range icpRoutes() {
		describe(paths, s, r, icpDocs[r.name])
	}
	for _, p := range api("/keys/{id}") {
		addTo(paths, p, http.MethodPost, oldAction(s, p))
	}
	for _, o := range openRoutes() {
		for _, p := range o.paths {
			addTo(paths, p, o.method, o.operation(s))
		}
	}
	s.of(kmsapi.Errors{})
	return object{
		"openapi": "3.1.0",
		"info":    object{"title": "kmsctl", "version": "2", "description": "IBM Key Protect v2 with ICP's dialect, and kmsctl's own calls."},
		"paths":   paths, "security": []any{object{"bearer": []string{}}},
		"components": object{"schemas": s, "securitySchemes": object{"bearer": object{"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}}},
	}
}

// describe adds the operations of a route.
func describe(paths object, s schemas, r route, d doc) {
	for _, p := range r.paths {
		for m := range strings.FieldsSeq(r.methods) {
			addTo(paths, strings.TrimSuffix(p, "{$}"), m, operation(s, r, d, p))
		}
	}
}

// oldAction is the older form of all actions on a key.
func oldAction(s schemas, path string) object {
	what := "An action on a key in its older form, ?action=NAME: the same as POST " + path + "/actions/NAME."
	op := operation(s, route{name: "kms.secrets.action", scope: onKey, status: http.StatusOK}, doc{query: "action"}, path)
	op["summary"] = what
	return op
}

func (o openRoute) operation(s schemas) object {
	op := object{"summary": o.what, "security": []any{}, "responses": object{"200": object{"description": o.what}}}
	if o.isToken() {
		op["requestBody"] = object{"content": object{"application/x-www-form-urlencoded": object{"schema": object{"type": "object", "required": []string{"grant_type"},
			"properties": object{"grant_type": object{"type": "string"}, "apikey": object{"type": "string"}}}}}}
		op["responses"] = object{"200": answer("the token", s.of(kmsapi.Token{})), "400": answer("refused", s.of(kmsapi.TokenError{}))}
	}
	return op
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

func operation(s schemas, r route, d doc, path string) object {
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
	if t.Name() == "" {
		return object{"type": "object", "properties": s.properties(t)}
	}
	name := strings.Trim(notInNames().ReplaceAllString(strings.ReplaceAll(t.Name(), "github.com/kmsctl/kmsctl/pkg/kmsapi.", ""), "_"), "_")
	if pkg := path.Base(t.PkgPath()); pkg != "kmsapi" { // whose names are ours alone
		name = pkg + "_" + name
	}
	ref := object{"$ref": "#/components/schemas/" + name}
	if _, done := s[name]; done {
		return ref
	}
	s[name] = nil // for a type that holds itself
	s[name] = object{"type": "object", "properties": s.properties(t)}
	return ref
}

func (s schemas) properties(t reflect.Type) object {
	props := object{}
	for f := range t.Fields() {
		key, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case f.Anonymous && key == "":
			maps.Copy(props, s.properties(f.Type))
		case f.IsExported() && key != "-":
			props[cmp.Or(key, f.Name)] = s.typ(f.Type)
		}
	}
	return props
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

// undocumented are the routes that their docs or about know nothing of, and
// entries without a route.
func undocumented() []string {
	var out []string
	check := func(rs []route, docs map[string]doc) {
		left := maps.Clone(docs)
		for _, r := range rs {
			if _, ok := docs[r.name]; !ok || about[r.name] == "" {
				out = append(out, r.name)
			}
			delete(left, r.name)
		}
		out = slices.AppendSeq(out, maps.Keys(left))
	}
	check(slices.Concat(keyRoutes(), instanceRoutes(), ownRoutes()), docs)
	check(icpRoutes(), icpDocs)
	for name := range about {
		if !slices.ContainsFunc(routes(), func(r route) bool { return r.name == name }) {
			out = append(out, name)
		}
	}
	return slices.Compact(slices.Sorted(slices.Values(out)))
}
